"""vLLM in the Engine's place, for a sweep: a `faststeer.generator.Generator`, every row under its own plan.

It loads the model's files itself, so a model that was changed in memory is not the one that runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from faststeer.compile import Entry, Need, compile_plan
from faststeer.generator import Completion, SamplingParams
from faststeer.plan import Plan, site_name
from faststeer.vllm.client import plan as payload_of

GROUP_BATCHES = 4  # batches that are handed to vLLM at once: its last one, which runs half empty, costs a quarter
MARGIN = 0.9  # of the GPU memory that is free beside the model that judges


class VllmEngine:
    """A vLLM engine for the plans of one sweep.

    Args:
        model: the Hugging Face model; its files are what vLLM loads.
        tokenizer: decodes the answers.
        plans: all that will be asked for: the tables are made for them.
        max_batch, max_length: as of `faststeer.Engine`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the model does not say which files it was loaded from.
    """

    def __init__(
        self, model: Any, tokenizer: Any, plans: Sequence[Plan | None], *, max_batch: int, max_length: int
    ) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError("engine: vllm needs vLLM: pip install vllm") from error
        path = getattr(model.config, "_name_or_path", "")
        if not path:
            raise ValueError("engine: vllm loads the model's files, and this model was not loaded from any")
        config = model.config.get_text_config()
        n_layers = config.num_hidden_layers
        used = [compile_plan(plan, n_layers, config.hidden_size) for plan in plans if plan is not None]
        memory: dict[str, Any] = {}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            memory["gpu_memory_utilization"] = MARGIN * free / total
        self._tokenizer, self._group = tokenizer, GROUP_BATCHES * max_batch
        self._payloads: dict[int, tuple[Plan | None, dict[str, str]]] = {}
        self._llm = LLM(
            model=path,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=max_length + 1,
            max_num_seqs=max_batch,
            additional_config={"faststeer": settings_for(used, n_layers)},
            **memory,
        )

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        plans: Sequence[Plan | None],
        sampling: SamplingParams,
        *,
        probe: Any = None,
    ) -> Iterator[Completion]:
        """The answers in order, a group of batches at a time (see `faststeer.generator.Generator`).

        vLLM draws other numbers for a seed than the Engine does.

        Raises:
            ValueError: a probe or a stop, which nobody asks a sweep for.
        """
        import vllm

        if probe is not None or sampling.stop:
            raise ValueError("vLLM answers sweeps, which have no probe and no stop: take faststeer.Engine for them")
        n, seed = len(prompts), sampling.seed
        seeds: Sequence[int | None] = [seed + i for i in range(n)] if isinstance(seed, int) else seed or [None] * n
        limits, temperatures, top_ks, top_ps = (
            list(value) if isinstance(value, Sequence) else [value] * n
            for value in (sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p)
        )
        for start in range(0, n, self._group):
            numbers = range(start, min(start + self._group, n))
            parameters = [
                vllm.SamplingParams(
                    max_tokens=limits[i],
                    temperature=temperatures[i],
                    top_k=top_ks[i],
                    top_p=top_ps[i],
                    seed=seeds[i],
                    extra_args=self._payload(plans[i]),
                )
                for i in numbers
            ]
            asked: Any = [{"prompt_token_ids": list(prompts[i])} for i in numbers]
            answers = self._llm.generate(asked, parameters, use_tqdm=False)
            for i, answer in zip(numbers, answers, strict=True):
                yield self._completion(i, asked[i - start]["prompt_token_ids"], answer.outputs[0])

    def close(self) -> None:
        """End the engine and its processes, and free its memory."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def _payload(self, plan: Plan | None) -> dict[str, str]:
        """Made once for each plan, which is kept, so that its id stays its own."""
        if id(plan) not in self._payloads:
            self._payloads[id(plan)] = (plan, payload_of(plan))
        return self._payloads[id(plan)][1]

    def _completion(self, index: int, prompt: list[int], output: Any) -> Completion:
        if output.finish_reason == "error":
            return Completion(index, "", [], prompt, None, "error", RuntimeError(output.stop_reason))
        # An end-of-sequence token counts here, and for the Engine it does not.
        ids, end = list(output.token_ids), None
        if output.finish_reason == "stop":
            *ids, end = ids
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(index, text, ids, prompt, None, "length" if end is None else "stop", stop_token=end)


def settings_for(plans: Sequence[Sequence[Entry]], n_layers: int) -> Mapping[str, Any]:
    """Settings of an engine that has room for these plans, compiled, and builds in what they use."""
    points = {site_name(entry.site, n_layers)[0] for entries in plans for entry in entries}
    need = Need.of(plans)
    return {
        "hook_points": sorted(points) or ["resid_post"],
        "max_entries": max(1, need.entries),
        "max_vectors": max([1, *(Need.of([entries]).vectors for entries in plans)]),
        "probe_columns": need.probe_columns,
        "latched_gates": need.latched_gates,
        "max_interventions": max(1, need.entries),
        "max_directions": max([1, *(len(e.basis) for entries in plans for e in entries)]),
        "max_plan_bytes": 2**30,  # these plans are nobody else's
        "max_dose": None,
    }
