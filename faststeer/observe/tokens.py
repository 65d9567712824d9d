"""Prompts with what follows them, as rows of tokens that know where the prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from faststeer.hf.batching import Prompt, encode, pad
from faststeer.hf.encoding import encode_texts


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a prompt and its completion."""

    prompt: list[int]
    completion: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.completion

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


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
        given = "one text" if isinstance(completions, str) else f"{len(completions)} completions"
        raise ValueError(f"{given} for {len(encoded)} prompts: expected a list with one completion for each")
    return [TokenRow(ids, _ids(tokenizer, text)) for ids, text in zip(encoded, completions, strict=True)]


def _ids(tokenizer: Any, completion: str | Sequence[int]) -> list[int]:
    if isinstance(completion, str):
        return encode_texts(tokenizer, [completion], begin=False)[0]
    return [int(token) for token in completion]


def batch_of(rows: Sequence[TokenRow], pad_id: int, device: Any) -> tuple[dict[str, Tensor], list[int]]:
    """The rows as one batch padded on the left, and the column behind each one's prompt."""
    width = max(map(len, rows))
    return pad([row.ids for row in rows], pad_id, device), [width - len(row.completion) for row in rows]
