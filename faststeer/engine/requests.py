"""What is asked of the engine: checked arguments, and where a completion ends."""

from __future__ import annotations

import math
import numbers
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from faststeer.engine.sampling import Mode
from faststeer.generator import SamplingParams
from faststeer.hf.batching import Prompt, encode, prompt_fault
from faststeer.plan import Plan, Plans, plans_for
from faststeer.vector import whole_number

T = TypeVar("T", int, float)
TOP_K = 2**63 - 1  # at most


@dataclass(eq=False)
class Request:
    """A prompt on its way."""

    index: int
    prompt: list[int]
    plan: Plan | None
    key: Hashable  # the plan's, as it was when it was asked for
    limit: int  # new tokens at most
    temperature: float
    top_k: int
    top_p: float
    seed: int
    tokens: list[int] = field(default_factory=list)
    launched: int = 0  # tokens drawn on the device, some of them not seen here yet
    slot: int = -1
    sequence: int = -1
    projections: Tensor | None = None
    done: bool = False

    @property
    def mode(self) -> Mode:
        if self.temperature == 0:
            return Mode.GREEDY
        return Mode.FILTER if self.top_k > 0 or self.top_p < 1 else Mode.TEMPERATURE


class Stops:
    """Where a completion ends: tokens, and strings in its text."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], stop: str | int | Sequence[str | int]) -> None:
        tokens = list(ends)
        self.strings: list[str] = []
        for item in stop if _is_list(stop) else [stop]:  # type: ignore[union-attr]
            if isinstance(item, str) and item:
                self.strings.append(item)
            elif (token := whole_number(item)) is not None and token >= 0:
                tokens.append(token)
            else:
                raise ValueError(f"stop holds {item!r}: expected strings that are not empty, and token ids")
        self.tokens = frozenset(tokens)
        self._tokenizer = tokenizer
        # A token adds at least one byte (a special one none, hence some more): a stop string that ends with the newest
        # token began within this many.
        self._tail = max((len(text.encode()) for text in self.strings), default=0) + 8

    def found(self, tokens: list[int]) -> bool:
        """Whether the newest token completes a stop string."""
        if not self.strings:
            return False
        tail = self.decode(tokens[-self._tail :])
        return any(text in tail for text in self.strings)

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def text(self, tokens: list[int]) -> str:
        """The text before the first stop string."""
        text = self.decode(tokens)
        return text[: min((at for stop in self.strings if (at := text.find(stop)) >= 0), default=len(text))]


def read_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt | Sequence[int]],
    max_length: int,
    vocabulary: int,
    *,
    rendered: bool = False,
) -> list[list[int]]:
    """Token ids of texts (`rendered` ones, or bare), chats, or token ids.

    Raises:
        ValueError: no list of prompts, an empty or blank one, one that leaves no room for a new token.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):
        raise ValueError(f"prompts is {prompts!r}: expected a list with at least one prompt")
    encoded: list[list[int] | None] = [_token_ids(prompt) for prompt in prompts]
    texts = [i for i, ids in enumerate(encoded) if ids is None]
    for i in texts:
        if fault := prompt_fault(prompts[i]):
            raise ValueError(f"prompts[{i}] {fault}: expected a text, a list of messages, or a list of token ids")
    if texts:
        names = [f"prompts[{i}]" for i in texts]
        words: list[Prompt] = [prompts[i] for i in texts]  # type: ignore[misc]
        for i, ids in zip(texts, encode(tokenizer, words, rendered=rendered, what=names), strict=True):
            encoded[i] = ids
    prompts_ids = [ids or [] for ids in encoded]
    for i, ids in enumerate(prompts_ids):
        if not ids:
            raise ValueError(f"prompts[{i}] has no tokens: expected at least one")
        if (worst := max(ids)) >= vocabulary or min(ids) < 0:
            wrong = worst if worst >= vocabulary else min(ids)
            raise ValueError(f"prompts[{i}] holds the token {wrong}: the model has 0 to {vocabulary - 1}")
        if len(ids) >= max_length:
            raise ValueError(
                f"prompts[{i}] has {len(ids)} tokens, and the engine holds {max_length} of prompt and completion "
                "together: shorten it, or make an Engine with a larger max_length"
            )
    return prompts_ids


def _token_ids(prompt: Any) -> list[int] | None:
    if isinstance(prompt, (Tensor, np.ndarray)) and prompt.ndim == 1:
        prompt = prompt.tolist()
    if not isinstance(prompt, (list, tuple)):
        return None
    ids = [whole_number(i) for i in prompt]
    return None if None in ids else ids  # type: ignore[return-value]


def read_plans(plans: Plans | None, n: int) -> list[Plan | None]:
    """One plan or None per prompt. Equal plans become one object.

    Raises:
        TypeError, ValueError: as `plans_for`; a plan with probes of its own.
    """
    listed = plans_for(n, plans)
    one_of: dict[int, Plan] = {}
    equal: dict[Hashable, Plan] = {}
    for i, plan in enumerate(listed):
        if plan is not None and id(plan) not in one_of:
            if any(intervention.probe for intervention in plan):
                raise ValueError(
                    f"plans[{i}] has probes of its own, which nobody would see: use generate(..., probe=...)"
                )
            one_of[id(plan)] = equal.setdefault(plan.key, plan)
    return [None if plan is None else one_of[id(plan)] for plan in listed]


def per_request(value: T | Sequence[T], n: int, name: str, low: T, high: float = math.inf) -> list[T]:
    """One number for all requests or one per request, each within [low, high]; whole ones where `low` is."""
    whole = isinstance(low, int)
    values: list[Any] = [value] * n if not _is_list(value) else list(value)  # type: ignore[arg-type]
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} numbers for {n} prompts: expected one for all, or one for each")
    read: list[Any] = [whole_number(each) if whole else _real_number(each) for each in values]
    for i, number in enumerate(read):
        if number is None or not low <= number <= high:
            least = f"a whole number, at least {low}" if whole else f"at least {low}"
            expected = least if high == math.inf else f"{low} to {high}"
            raise ValueError(f"{name}{f'[{i}]' if _is_list(value) else ''} is {values[i]!r}: expected {expected}")
    return read


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) == 1


def _real_number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def read_requests(
    encoded: Sequence[list[int]], plans: Sequence[Plan | None], sampling: SamplingParams
) -> list[Request]:
    """A request for each prompt, its numbers checked. Raises ValueError for numbers that cannot be drawn with."""
    n = len(encoded)
    keys = {id(plan): plan.key for plan in plans if plan is not None}
    columns = (
        encoded,
        plans,
        [keys.get(id(plan)) for plan in plans],
        per_request(sampling.max_new_tokens, n, "max_new_tokens", 1),
        per_request(sampling.temperature, n, "temperature", 0.0, 1e6),
        per_request(sampling.top_k, n, "top_k", 0, TOP_K),
        per_request(sampling.top_p, n, "top_p", 1e-9, 1.0),
        read_seeds(sampling.seed, n),
    )
    return [Request(index, *values) for index, values in enumerate(zip(*columns, strict=True))]


def read_seeds(seed: int | Sequence[int] | None, n: int) -> list[int]:
    """A seed per request: those given; from one seed, seed + index; from None, torch's global generator."""
    if seed is None:
        return torch.randint(2**62, (n,), device="cpu").tolist()
    first = whole_number(seed)
    listed = map(whole_number, seed if _is_list(seed) else ())  # type: ignore[arg-type]
    seeds = list(listed) if first is None else [first + i for i in range(n)]
    if len(seeds) != n or not all(s is not None and -(2**63) <= s < 2**63 for s in seeds):
        raise ValueError(f"seed is {seed!r}: expected a whole number of 64 bits, or one for each of the {n} prompts")
    return seeds  # type: ignore[return-value]
