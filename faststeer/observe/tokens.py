"""Prompts with what follows them, as rows of tokens that know where the prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from faststeer.hf.batching import Prompt, TokenRow, encode
from faststeer.hf.encoding import encode_texts


def rows(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[str | Sequence[int]] | None = None,
    system: str | None = None,
) -> list[TokenRow]:
    """Each prompt (as the chat template writes it) with its completion: a text (without special tokens) or token ids.

    Raises:
        ValueError: as `encode`; another number of completions than prompts.
    """
    encoded = encode(tokenizer, prompts, system)
    if completions is None:
        return [TokenRow(ids, []) for ids in encoded]
    if isinstance(completions, str) or len(completions) != len(encoded):
        there = "one text" if isinstance(completions, str) else f"{len(completions)} completions"
        raise ValueError(f"{there} for {len(encoded)} prompts: expected a list with one completion for each")
    return [TokenRow(ids, _ids(tokenizer, text)) for ids, text in zip(encoded, completions, strict=True)]


def _ids(tokenizer: Any, completion: str | Sequence[int]) -> list[int]:
    if isinstance(completion, str):
        return encode_texts(tokenizer, [completion], begin=False)[0]
    return [int(token) for token in completion]
