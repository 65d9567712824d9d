"""Completions of many prompts, each under its own plan, in mixed batches.

The Engine answers where it can, `model.generate` where the Engine refuses the model or something else than `steer` is
to be in force.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from faststeer.engine import Engine, end_tokens
from faststeer.engine.check import vocabulary
from faststeer.engine.requests import Request, Stops, read_prompts, read_requests
from faststeer.engine.sampling import Mode, Sampling, choose
from faststeer.evaluate.likelihood import Within
from faststeer.generator import GREEDY, Completion, Generator, SamplingParams
from faststeer.hf import steer
from faststeer.hf.batching import (
    Prompt,
    batches,
    check_evaluating,
    encode,
    forward_arguments,
    model_device,
    pad,
    padding_id,
)
from faststeer.hf.steering import is_steered
from faststeer.plan import Plans, plans_for
from faststeer.progress import progress_bar

TIMED_SHARE = 1 / 16  # of the rows, at most, are timed for a forecast
TIMED_TOKENS = 5  # of an answer, for a forecast
TIMED_ANSWERS = 4  # times as many as there would be rows that are timed to the end
# Of a generation config: what says nothing of which tokens a greedy completion holds, or what every generator reads.
UNHEEDED = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "num_beams", "temperature", "top_k", "top_p", "min_p",
    "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_length", "max_new_tokens", "max_time", "use_cache",
    "cache_implementation", "cache_config", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "early_stopping", "length_penalty", "num_return_sequences",
    "transformers_version", "_from_model_config", "disable_compile", "prefill_chunk_size",
}  # fmt: skip


class HuggingFace:
    """A `Generator` by `model.generate`, in batches of prompts of similar length.

    Penalties and forced tokens of the model's generation config are in force. Tokens are drawn as the Engine draws
    them: the same seed gives the same tokens, to rounding.

    Args:
        model, tokenizer: any causal language model of transformers, in evaluation mode.
        max_batch: prompts that are generated together.
        within: the context that puts a batch's plans on the model; others than `steer` are in `faststeer.observe`.
        why: the reason that the Engine does not answer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_batch: int = 32, within: Within = steer, why: str = ""
    ) -> None:
        check_evaluating(model)
        self.model, self.tokenizer, self.max_batch, self.within, self.why = model, tokenizer, max_batch, within, why

    def complete(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        plans: Plans | None = None,
        sampling: SamplingParams = GREEDY,
        *,
        probe: Any = None,
    ) -> Iterator[Completion]:
        """See `faststeer.generator.Generator`; completions come batch by batch.

        Raises:
            ValueError: as the Engine; a probe, which only the Engine watches.
        """
        if probe is not None:
            reason = f" ({self.why})" if self.why else ""
            raise ValueError(
                f"probe= needs the Engine, and model.generate answers here{reason}: read activations with "
                "faststeer.observe.capture"
            )
        # A prompt that is too long for the model's positions is `generate`'s to refuse.
        encoded = read_prompts(self.tokenizer, prompts, sys.maxsize, vocabulary(self.model))
        requests = read_requests(encoded, plans_for(len(encoded), plans), sampling)
        stops = Stops(self.tokenizer, end_tokens(self.model, self.tokenizer), sampling.stop)
        return self._run(requests, stops)

    @torch.no_grad()
    def _run(self, requests: list[Request], stops: Stops) -> Iterator[Completion]:
        device, pad_id = model_device(self.model), padding_id(self.tokenizer)
        for group in batches([len(request.prompt) for request in requests], self.max_batch):
            rows = [requests[index] for index in group]
            batch = pad([row.prompt for row in rows], pad_id, device)
            del batch["position_ids"]  # generate counts positions itself, from the mask
            numbers = ([getattr(row, name) for row in rows] for name in ("temperature", "top_k", "top_p", "seed"))
            temperature, top_k, top_p, seed = (torch.tensor(column, device=device) for column in numbers)
            draw = _Draw(Sampling(temperature.float(), top_k, top_p.float(), seed))
            settings: dict[str, Any] = {
                "max_new_tokens": max(row.limit for row in rows),
                "do_sample": False,
                "num_beams": 1,
            }
            if stops.tokens:
                settings["eos_token_id"] = sorted(stops.tokens)
            plans = [row.plan for row in rows]
            with self.within(self.model, plans) if any(plan is not None for plan in plans) else nullcontext():
                output = self.model.generate(
                    **batch, **settings, pad_token_id=pad_id, logits_processor=LogitsProcessorList([draw])
                )
            new = output[:, batch["input_ids"].shape[1] :].tolist()
            for row, tokens, failed in zip(rows, new, draw.failed, strict=True):
                yield _completion(row.index, row.prompt, tokens[: row.limit], failed, stops)


class _Draw(LogitsProcessor):
    """Draws as the Engine does, behind the other processors, and leaves `generate` that token alone."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.count = sampling, torch.zeros_like(sampling.seed)
        self.failed = [-1] * len(sampling.seed)  # of each row: the step whose logits are not finite
        hot = bool((sampling.temperature > 0).any())
        filters = bool((sampling.top_k > 0).any() or (sampling.top_p < 1).any())
        self.mode = Mode.GREEDY if not hot else Mode.FILTER if filters else Mode.TEMPERATURE

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = choose(scores, self.sampling, self.count, self.mode)
        for row in (tokens < 0).nonzero().flatten().tolist():
            self.failed[row] = int(self.count[row]) if self.failed[row] < 0 else self.failed[row]
        self.count += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens.clamp(min=0).unsqueeze(-1), 0.0)


def _completion(index: int, prompt: list[int], row: list[int], failed: int, stops: Stops) -> Completion:
    """What a row of `generate` comes to: tokens up to the first that ends it, as the Engine reads them."""
    tokens: list[int] = []
    for step, token in enumerate(row):
        if step == failed:
            fault = ValueError("the logits hold NaN or infinity: is the steering too strong for the model's dtype?")
            return Completion(index, stops.text(tokens), tokens, prompt, None, "error", fault)
        if token in stops.tokens:
            return Completion(index, stops.text(tokens), tokens, prompt, None, "stop", stop_token=token)
        tokens.append(token)
        if stops.found(tokens):
            return Completion(index, stops.text(tokens), tokens, prompt, None, "stop")
    return Completion(index, stops.text(tokens), tokens, prompt, None, "length")


def generator(
    model: Any, tokenizer: Any, *, max_batch: int = 32, max_length: int | None = None, within: Within = steer
) -> Generator:
    """Return what answers prompts: the Engine; `HuggingFace`, whose `why` gives the reason, where the Engine refuses
    the model, the model's generation config asks for what the Engine does not do, the model is being steered already,
    or with another `within`.

    Args:
        max_batch: rows that run together.
        max_length: tokens of a prompt and its completion together, as of the Engine.

    Raises:
        ValueError: a model in training mode.
    """
    check_evaluating(model)
    if max_batch < 1:
        raise ValueError(f"batch_size is {max_batch}: expected at least 1")
    why = "another context than steer is asked for" if within is not steer else ""
    if not why and is_steered(model):
        why = "the model is being steered already"
    if not why and (asked := _processors(model)):
        why = f"the model's generation config asks for {', '.join(asked)}"
    if not why:
        try:
            return Engine(model, tokenizer, max_batch=max_batch, max_length=max_length)
        except ValueError as error:
            why = str(error)
    return HuggingFace(model, tokenizer, max_batch=max_batch, within=within, why=why)


def _processors(model: Any) -> list[str]:
    """What a model's generation config asks for that changes which tokens a greedy completion holds."""
    plain = GenerationConfig().to_dict()
    return sorted(
        name
        for name, value in model.generation_config.to_dict().items()
        if name not in UNHEEDED
        and value not in (None, [], {}, plain.get(name))
        and value != (1 if name.endswith(("penalty", "scale")) else 0)
    )


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    plans: Plans | None = None,
    *,
    system: str | None = None,
    rendered: bool = False,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = False,
    within: Within = steer,
) -> list[str]:
    """Return the greedy completion of each prompt, without special tokens, in the order of the prompts.

    Args:
        prompts: texts or chat message lists.
        plans: one plan for all prompts, or one per prompt (None: unsteered), or None.
        system: a system prompt put before every prompt.
        rendered: the prompts hold the chat template's markup already and are taken as they are.
        max_new_tokens: where a completion ends if no end-of-sequence token comes first.
        batch_size: rows that run together.
        progress: show a progress bar on stderr.
        within: the context that puts a batch's plans on the model; others than `steer` are in `faststeer.observe`.

    The end-of-sequence tokens are those of the model's own generation config (else the tokenizer's), and so are
    penalties it may ask for. The Engine answers; `generator` says when `model.generate` does. A completion whose logits
    are not finite ends there, with a warning.

    Raises:
        ValueError: no prompts, another number of plans than prompts, `max_new_tokens` or `batch_size` below 1, a model
            in training mode.
    """
    encoded = encode(tokenizer, prompts, system, rendered=rendered)
    per_prompt = plans_for(len(encoded), plans)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    answers = completions(
        model, tokenizer, encoded, per_prompt, SamplingParams(max_new_tokens),
        batch_size=batch_size, progress=progress, within=within,
    )  # fmt: skip
    return [answer.text for answer in answers]


def completions(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    plans: Plans | None,
    sampling: SamplingParams,
    *,
    batch_size: int = 32,
    progress: bool = False,
    within: Within = steer,
) -> list[Completion]:
    """Return the completions of prompts given as token ids, in their order. Options as in `complete`."""
    limit = sampling.max_new_tokens
    length = max(map(len, encoded)) + (limit if isinstance(limit, int) else max(limit))
    rows = min(batch_size, len(encoded))
    answering = generator(model, tokenizer, max_batch=rows, max_length=length, within=within)
    answers: dict[int, Completion] = {}
    with progress_bar("Generating", len(encoded), progress) as advance:
        for answer in answering.complete(encoded, plans, sampling):
            answers[answer.index] = answer
            advance()
    if failed := [answer for answer in answers.values() if answer.error is not None]:
        warnings.warn(f"{len(failed)} of {len(answers)} completions end early: {failed[0].error}", stacklevel=3)
    return [answers[index] for index in range(len(encoded))]


def seconds_per_answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    n_answers: int,
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> float:
    """Time the first tokens of one batch of unsteered answers, for a forecast: seconds per answer of the longest
    length.

    Args:
        n_answers: that are to be forecast. No more than a small part of them are timed.
        The rest as in `complete`.
    """
    # Of each answer only the first tokens are timed, so that more rows may be: rows of a small batch take longer.
    n_rows = TIMED_ANSWERS * n_answers
    batch = timed_batch(model, encode(tokenizer, prompts, system), padding_id(tokenizer), batch_size, n_rows)
    rows = batch["input_ids"].tolist()
    n_tokens = min(max_new_tokens, TIMED_TOKENS)
    answering = generator(model, tokenizer, max_batch=len(rows), max_length=len(rows[0]) + n_tokens)
    seconds, drawn = [0.0], [len(rows)]
    for limit in sorted({1, n_tokens}):
        start = time.monotonic()
        lengths = [len(answer.token_ids) for answer in answering.complete(rows, None, SamplingParams(limit))]
        seconds.append(time.monotonic() - start)
        drawn.append(sum(lengths))
    # Behind the first token, which comes with the reading of the prompt.
    per_token = max(seconds[-1] - seconds[1], 0.0) / max(drawn[-1] - len(rows), 1)
    return seconds[1] / len(rows) + per_token * (max_new_tokens - 1)


@torch.no_grad()
def seconds_per_row(model: Any, encoded: Sequence[Sequence[int]], pad_id: int, batch_size: int, n_rows: int) -> float:
    """Time one unsteered forward pass over prompts of middle length, to forecast `n_rows` rows: seconds per row of a
    batch."""
    batch = timed_batch(model, encoded, pad_id, batch_size, n_rows)
    start = time.monotonic()
    model(**forward_arguments(model, batch)).logits[:, -1].cpu()
    return (time.monotonic() - start) / len(batch["input_ids"])


@torch.no_grad()
def timed_batch(
    model: Any, encoded: Sequence[Sequence[int]], pad_id: int, batch_size: int, n_rows: int
) -> dict[str, Tensor]:
    """Return what is timed to forecast `n_rows` rows: a batch of the prompt of middle length, of a part of them at most
    (TIMED_SHARE). The model has run once then: weights that lie in a file are read at their first use."""
    middle, device = sorted(encoded, key=len)[len(encoded) // 2], model_device(model)
    model(**forward_arguments(model, pad([middle[:1]], pad_id, device))).logits[:, -1].cpu()
    return pad([middle] * max(1, min(batch_size, int(n_rows * TIMED_SHARE))), pad_id, device)
