"""Preference pairs: a prompt with the completion that is wanted and the one that is not. What vectors found by
optimisation are trained on.

Nothing here runs a model. Completions become tokens as the model would generate them: after the prompt's own tokens,
never merged with them, and closed by the end of the turn as the chat template writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from faststeer.hf.batching import Prompt, TokenRow, encode, prompt_fault
from faststeer.hf.encoding import apply_template, encode_texts, special_ids

PLACEHOLDER = "faststeer"


@dataclass(frozen=True)
class Pair:
    """A prompt and two completions of it.

    Args:
        prompt: a text or a chat message list.
        chosen: the completion to make likely.
        rejected: the completion to make unlikely; None where there is none, which is enough for `ntp`.
        sign: +1 where the vector is added to get `chosen`, -1 where it is subtracted. For a refusal vector: +1 for a
            harmless prompt with a refusal chosen, -1 for a harmful prompt with compliance chosen.

    `positive` is the completion that shows what the vector stands for, `negative` the one that does not.

    Raises:
        ValueError: no prompt, a blank completion, twice the same, another sign.
    """

    prompt: Prompt
    chosen: str
    rejected: str | None = None
    sign: int = 1

    def __post_init__(self) -> None:
        if fault := prompt_fault(self.prompt):
            raise ValueError(f"a Pair's prompt {fault}: expected a text or a list of messages")
        for name in ("chosen", "rejected"):
            text = getattr(self, name)
            if name == "rejected" and text is None:
                continue
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"a Pair's {name} is {text!r}: expected a completion as text")
        if self.chosen == self.rejected:
            raise ValueError(f"a Pair's chosen and rejected are both {self.chosen!r}: there is nothing to prefer")
        if isinstance(self.sign, bool) or self.sign not in (1, -1):
            raise ValueError(
                f"a Pair's sign is {self.sign!r}: expected 1 (chosen when added) or -1 (chosen when subtracted)"
            )

    @property
    def positive(self) -> str | None:
        """The completion that shows the behaviour: the chosen one where the sign is +1, else the rejected one."""
        return self.chosen if self.sign > 0 else self.rejected

    @property
    def negative(self) -> str | None:
        """The completion that does not: the rejected one where the sign is +1, else the chosen one."""
        return self.rejected if self.sign > 0 else self.chosen


def check_pairs(pairs: Iterable[Pair], what: str = "pairs", *, rejected: bool = False) -> list[Pair]:
    """Return `pairs` as a list, or raise ValueError naming the first that cannot be used.

    Args:
        rejected: whether every pair needs a rejected completion.
    """
    if isinstance(pairs, Pair) or not isinstance(pairs, Iterable):
        raise ValueError(f"{what} is one {type(pairs).__name__}: expected a list of Pair")
    pairs = list(pairs)
    if not pairs:
        raise ValueError(f"{what} is empty: expected at least one Pair")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, Pair):
            raise ValueError(
                f"{what}[{index}] is a {type(pair).__name__}: expected Pair(prompt, chosen, rejected, sign)"
            )
        if rejected and pair.rejected is None:
            raise ValueError(f"{what}[{index}] has no rejected completion: a preference needs one (ntp does not)")
    return pairs


def turn_end(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: what the chat template writes after the assistant's words, up to the first
    special token; without a template the end-of-sequence token, where there is one."""
    if not getattr(tokenizer, "chat_template", None):
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt, answer = "Hello", {"role": "assistant", "content": PLACEHOLDER}
    chat = [{"role": "user", "content": prompt}, answer]
    whole = apply_template(tokenizer, chat, "closed", "an example of an answer")
    after = whole[whole.rindex(PLACEHOLDER) + len(PLACEHOLDER) :]
    ids = encode_texts(tokenizer, [after], begin=False)[0] if after else []
    special = special_ids(tokenizer)
    end = next((place for place, token in enumerate(ids) if token in special), None)
    return [] if end is None else ids[: end + 1]


def encode_completions(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    system: str | None = None,
    rendered: bool = False,
    max_tokens: int | None = None,
) -> list[TokenRow]:
    """Return each prompt with its completion as tokens (at least one), the first `max_tokens` of the completion and its
    end.

    Raises:
        ValueError: as `render`; a completion without tokens.
    """
    ends = turn_end(tokenizer)
    before = encode(tokenizer, prompts, system, rendered=rendered)
    after = encode_texts(tokenizer, completions, begin=False)
    texts = []
    for index, (prompt, completion) in enumerate(zip(before, after, strict=True)):
        if not completion:
            raise ValueError(f"the completion {completions[index]!r} has no tokens: expected at least one")
        texts.append(TokenRow(tuple(prompt), tuple([*completion, *ends][:max_tokens])))
    return texts
