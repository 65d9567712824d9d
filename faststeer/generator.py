"""What answers prompts: one interface for the Engine, Hugging Face's `generate` and vLLM.

It says what is asked and what comes back. It never generates: `faststeer.Engine`, `evaluate.generate.HuggingFace` and
`vllm.runner.VllmEngine` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from faststeer.plan import Plans

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn, and where a completion ends. Each number is one for all prompts, or one per prompt.

    Args:
        max_new_tokens: tokens of a completion at most.
        temperature: 0: greedy. top_k: draw from the k likeliest tokens; 0: from all. top_p: from the fewest tokens that
            hold this probability.
        seed: prompt i draws with seed + i, or with its own from a list; None: from torch's global generator.
        stop: strings and token ids that end a completion, beside the end-of-sequence tokens.
    """

    max_new_tokens: int | Sequence[int] = 64
    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    seed: int | Sequence[int] | None = None
    stop: str | int | Sequence[str | int] = ()


GREEDY = SamplingParams()


@dataclass(frozen=True)
class Completion:
    """What a generator answers to one prompt.

    Attributes:
        index: the prompt's place in the list.
        text: decoded without special tokens; cut before the stop string that ended it.
        token_ids: what was generated, without the end-of-sequence or stop token that ended it.
        prompt_ids: the tokens of the prompt.
        projections: with `probe=`, `[sites, tokens]` or, for k directions, `[sites, tokens, k]`, fp32, on the CPU:
            h . v / |v| at every token that the model read. These are the tokens of the prompt and all generated tokens
            except the last.
        finish_reason: "stop": end of sequence, stop token or stop string; "length": `max_new_tokens` or the engine's
            `max_length`; "error": see `error`.
        error: why this request failed, if it did.
        stop_token: the end-of-sequence or stop token that ended it; None if no such token did.
    """

    index: int
    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    projections: Tensor | None
    finish_reason: FinishReason
    error: Exception | None = None
    stop_token: int | None = None


class Generator(Protocol):
    """Answers prompts, each under its own plan."""

    def complete(
        self,
        prompts: Sequence[Any],
        plans: Plans | None = None,
        sampling: SamplingParams = GREEDY,
        *,
        probe: Any = None,
    ) -> Iterator[Completion]:
        """Yield a completion for each prompt, as they end.

        Args:
            prompts: texts, chat message lists, or lists of token ids.
            plans: one for all, or one (or None) per prompt.
            probe: a direction that is watched, see `Completion.projections`.

        Raises:
            ValueError: what cannot be done with these prompts, plans or settings, before anything runs.
        """
        ...
