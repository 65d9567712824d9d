"""TransformerLens: `TransformerBridge` (which computes attention eagerly), hooks on `hook_out` of its blocks."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from job import OnTransformers, main, row_coefficients
from transformer_lens.model_bridge import TransformerBridge


class TransformerLens(OnTransformers):
    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job)
        self.versions["transformer-lens"] = version("transformer-lens")
        del self.model
        self.bridge = TransformerBridge.boot_transformers(
            job["folder"], device="cpu", dtype=torch.float32, tokenizer=self.tokenizer
        )
        self.names = [f"blocks.{n}.hook_out" for n in range(len(self.directions))]

    def vector(self) -> None:
        means = []
        for texts in (self.job["positive"], self.job["negative"]):
            rows = []
            for start in range(0, len(texts), 32):
                batch = self.tokenizer(texts[start : start + 32], return_tensors="pt", padding=True)
                with torch.no_grad():
                    _, cache = self.bridge.run_with_cache(
                        batch["input_ids"], attention_mask=batch["attention_mask"], names_filter=self.names
                    )
                rows.append(torch.stack([cache[name][:, -1] for name in self.names], 1))
            means.append(torch.cat(rows).mean(0))
        assert bool(torch.isfinite(means[0] - means[1]).all())

    def hooks(self, case: str) -> list[tuple[str, Any]]:
        if case != "plan per row":
            return [(self.names[n], lambda h, hook, v=self.directions[n]: h + v) for n in self.layers(case)]
        add, ablate = (torch.from_numpy(x)[:, :, None, None] for x in row_coefficients(self.job))

        def change(h, hook, n):  # type: ignore[no-untyped-def]
            v = self.directions[n]
            q = v / v.norm()
            return h + add[n] * v - ablate[n] * (h @ q).unsqueeze(-1) * q

        return [(self.names[n], lambda h, hook, n=n: change(h, hook, n)) for n in self.job["layers"]]

    def generate(self, case: str, new_tokens: int) -> int:
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=self.hooks(case)):
            ids = self.bridge.generate(
                self.batch["input_ids"], attention_mask=self.batch["attention_mask"], max_new_tokens=new_tokens,
                do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False,
            )  # fmt: skip
        return ids[:, self.batch["input_ids"].shape[1] :].numel()

    def logits(self, case: str) -> np.ndarray:
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=self.hooks(case)):
            logits = self.bridge(self.batch["input_ids"], attention_mask=self.batch["attention_mask"])
        return logits[:, -1].float().numpy()


if __name__ == "__main__":
    main(TransformerLens)
