"""What a plan means for vLLM's prefix cache: blocks of keys and values are shared between requests exactly where their
plans do the same to the same tokens. Runs in the engine's process, where blocks are hashed; never looks at a plan
itself, only at its digest and at the positions where it acts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from faststeer.vllm.requests import Wire, received
from faststeer.vllm.switch import PAYLOAD_KEY

BlockKey = tuple[str, str, tuple[tuple[int, int], ...]]


def block_key(wire: Wire, prompt_length: int, start: int, end: int) -> BlockKey | None:
    """What a plan adds to the hash of the block of tokens [start, end) of a request; None where it acts on none.

    The hash of a block covers those before it, so that a block has to say only what happens to its own tokens: which
    plan, and which part of the block each of its ranges of positions covers. Two requests share a block if these agree
    from the first block on: prompts before a plan for generated tokens are everybody's, and "the last prompt token" is
    another one in a longer prompt.
    """
    covered = []
    for low, high in wire.ranges:
        first, last = max(low + prompt_length, start), min(high + prompt_length, end)
        covered.append((first - start, last - start) if first < last else (0, 0))
    if not any(last for _, last in covered):
        return None
    return PAYLOAD_KEY, wire.digest, tuple(covered)


def with_block_key(extra_keys: Iterable[Any] | None, request: Any, start: int, end: int) -> tuple[Any, ...] | None:
    """vLLM's extra keys of a block, and the plan's."""
    wire = received(getattr(request.sampling_params, "extra_args", None)) if request.sampling_params else None
    key = None if wire is None else block_key(wire, request.num_prompt_tokens, start, end)
    keys = None if extra_keys is None else tuple(extra_keys)
    return keys if key is None else (*(keys or ()), key)
