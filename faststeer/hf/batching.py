"""From prompts to token batches.

Every evaluation and extraction goes through here, so that chat templates, begin-of-sequence tokens, padding and
position ids are handled once. It never samples, never changes the tokenizer or the model, and pads by hand on the left,
so that the last column of a batch is every row's last prompt token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from faststeer.hf.encoding import (
    Chat,
    End,
    Rendered,
    apply_template,
    check_markup,
    check_tokenizer,
    encode_rendered,
    encode_texts,
    has_template,
)
from faststeer.plan import Plan, distinct
from faststeer.vector import check_text

Prompt = str | list[dict[str, str]]


def check_prompts(
    prompts: Sequence[Prompt], what: str | Sequence[str] = "prompts", *, rendered: bool = False
) -> list[Prompt]:
    """Return `prompts` as a list; with `rendered` each is marked as `Rendered`.

    Args:
        what: what errors call the prompts: a name for all, which gets their numbers, or each one's name.

    Raises:
        ValueError: no prompts, or something that is no text and no chat message list; with `rendered`, a chat.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"{what} is one {type(prompts).__name__}: expected a list of prompts")
    prompts = list(prompts)
    if not prompts:
        raise ValueError(f"{what} is empty: expected at least one prompt")
    for name, prompt in zip(_names(what, len(prompts)), prompts, strict=True):
        if fault := prompt_fault(prompt):
            raise ValueError(f"{name} {fault}: expected a text or a list of messages {{'role': ..., 'content': ...}}")
        if rendered and not isinstance(prompt, str):
            raise ValueError(f"{name} is a chat: rendered=True takes texts, leave it out for chats")
    return [Rendered(prompt) for prompt in prompts] if rendered else prompts


def prompt_sets(rendered: bool, **sets: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Return several named lists of prompts, each as `check_prompts` returns it."""
    return {name: check_prompts(prompts, name, rendered=rendered) for name, prompts in sets.items()}


def prompt_fault(prompt: object) -> str | None:
    """Return what is wrong with a prompt, None when it is a text that is not blank or a chat message list."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "is blank"
    if not isinstance(prompt, list):
        return f"is of type {type(prompt).__name__}"
    if not prompt:
        return "is a chat without messages"
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"holds {str(message)[:200]}, which is no message with a text as its role and one as its content"
    return None


def render(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    system: str | None = None,
    *,
    rendered: bool = False,
    what: str | Sequence[str] = "prompts",
) -> list[str]:
    """Return each prompt as the text the model continues.

    A text becomes one user message; the tokenizer's chat template is applied with its generation prompt. A chat that
    ends with the assistant's message is continued from there instead. A tokenizer without a chat template takes the
    text as it is. A `Rendered` text stays what it is.

    Args:
        prompts: texts or chat message lists.
        system: a system prompt put before every prompt.
        rendered: the prompts are texts that hold the chat template's markup already; as if each were `Rendered`.
        what: what errors call the prompts: a name for all, which gets their numbers, or each one's name.

    Raises:
        ValueError: no prompts, something that is no prompt, a second system prompt or one beside a `Rendered` text, a
            chat that the template (or its absence) does not allow; a template that drops or changes a message's text
            (white space around it, and earlier answers' thinking, may go); a message that holds the template's own
            marks or special tokens, so that it was rendered before, or would end a message and begin another.
    """
    check_tokenizer(tokenizer)
    check_text(system, "system")
    prompts = check_prompts(prompts, what, rendered=rendered)
    names, head = _names(what, len(prompts)), [] if system is None else [{"role": "system", "content": system}]
    if head and any(isinstance(prompt, Rendered) for prompt in prompts):
        raise ValueError("the prompts are rendered, and system= gives a system prompt: write it into their texts")
    chats: dict[int, Chat] = {
        i: [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for i, prompt in enumerate(prompts)
        if not isinstance(prompt, Rendered)
    }
    templated = has_template(tokenizer)
    for i, chat in chats.items():
        if head and chat[0]["role"] == "system":
            raise ValueError(
                f"{names[i]} has a system message of its own, and system= gives another: leave one of them out"
            )
        if chat[-1]["role"] == "assistant" and not chat[-1]["content"].strip():
            raise ValueError(
                f"{names[i]} ends with a blank answer: leave that message out, an answer begins there anyway"
            )
        if not templated and (head or len(chat) > 1):
            raise ValueError(
                f"{names[i]}: the tokenizer has no chat template, so it takes one text without a system prompt; "
                "write the whole prompt as text"
            )
    if templated and chats:
        check_markup(tokenizer, [head, *chats.values()], ["system", *(names[i] for i in chats)])
    texts = cast("list[str]", prompts)
    for i, chat in chats.items():
        end: End = "begun" if chat[-1]["role"] == "assistant" else "prompt"
        texts[i] = apply_template(tokenizer, [*head, *chat], end, names[i]) if templated else chat[0]["content"]
    return texts


def encode(tokenizer: Any, prompts: Sequence[Prompt], system: str | None = None, **options: Any) -> list[list[int]]:
    """Return the token ids of each prompt as `render` writes it, with exactly the special tokens the model expects.

    A chat template writes its own begin-of-sequence token, so the tokenizer adds none; plain text gets what the
    tokenizer puts in front, but never twice, and nothing that it appends: an answer begins where the prompt ends.

    Args:
        options: `rendered` and `what`, as of `render`.

    Raises:
        ValueError: as `render`, or a prompt that has no tokens.
    """
    texts = render(tokenizer, prompts, system, **options)
    encoded = (encode_rendered if has_template(tokenizer) else encode_texts)(tokenizer, texts)
    if [] in encoded:
        raise ValueError(f"the prompt {texts[encoded.index([])]!r} has no tokens: expected at least one")
    return encoded


def _names(what: str | Sequence[str], n: int) -> list[str]:
    return [f"{what}[{index}]" for index in range(n)] if isinstance(what, str) else list(what)


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `position_ids` `[batch, seq]`, padded on the left.

    A row's first token has position 0.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device="cpu")
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device="cpu")
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a prompt and of what follows it."""

    prompt: Sequence[int]
    completion: Sequence[int]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.completion]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def pad_rows(rows: Sequence[TokenRow], pad_id: int, device: Any) -> tuple[dict[str, Tensor], list[int]]:
    """Return the rows as one batch padded on the left (`pad`), and the column behind each one's prompt."""
    width = max(map(len, rows))
    return pad([row.ids for row in rows], pad_id, device), [width - len(row.completion) for row in rows]


def tokenize(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    system: str | None = None,
    device: torch.device | str = "cpu",
    *,
    rendered: bool = False,
) -> dict[str, Tensor]:
    """Return the prompts as one batch padded on the left: `input_ids`, `attention_mask`, `position_ids` `[batch, seq]`.

    Args and errors as `encode`.
    """
    return pad(encode(tokenizer, prompts, system, rendered=rendered), padding_id(tokenizer), device)


def padding_id(tokenizer: Any) -> int:
    """Return a token id to fill rows with: being masked, any will do where the tokenizer has none of its own."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices `0..len(lengths) - 1` in batches of similar length.

    The longest come first, so that a batch that does not fit into memory fails at the start.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected at least 1")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def model_name(model: Any) -> str | None:
    """Return the name a Hugging Face model was loaded by, None for one made from a config."""
    return getattr(model, "loaded_as", None) or getattr(getattr(model, "config", None), "_name_or_path", None) or None


def check_evaluating(model: Any) -> None:
    """Raise ValueError for a model in training mode, whose dropout would make every figure random."""
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")


def model_device(model: Any) -> torch.device:
    """Return the device a model's token ids belong on, which with a device map is that of its embedding."""
    return model.get_input_embeddings().weight.device


def forward_arguments(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments for one forward pass over a padded batch, for the last token's logits alone.

    `position_ids` keep absolute position embeddings independent of padding; models that count positions otherwise do
    not take them.

    Raises:
        ValueError: rows whose positions are encoded by the length of the longest, and differently when alone; a token
            that the model does not have.
    """
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    ids = batch["input_ids"]
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        batch = {**batch, "input_ids": ids * batch["attention_mask"][:, -ids.shape[1] :]}  # a padding token was added
        if (highest := int(batch["input_ids"].max())) >= vocabulary:
            raise ValueError(
                f"a prompt holds the token {highest}: the model has 0 to {vocabulary - 1}; is the tokenizer another "
                "model's?"
            )
    _check_rotation(model, batch["attention_mask"])
    arguments: dict[str, Any] = {**batch, "use_cache": False, "logits_to_keep": 1}
    known = inspect.signature(model.forward).parameters
    optional = ("position_ids", "use_cache", "logits_to_keep")
    return {name: value for name, value in arguments.items() if name in known or name not in optional}


def _check_rotation(model: Any, mask: Tensor) -> None:
    """Raise ValueError where a rotary embedding would turn a short row as the longest row of its batch asks for."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else None
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for kind in [rotary, *rotary.values()]:  # one, or one for each kind of layer
        name = kind.get("rope_type", "") if isinstance(kind, Mapping) else ""
        if name != "longrope" and "dynamic" not in name:
            continue
        edge, lengths = text.max_position_embeddings, mask.sum(1)
        changed = lengths < mask.shape[1]
        if name == "longrope":  # one of two rotations
            edge = kind.get("original_max_position_embeddings", edge)
            changed = lengths <= edge
        if mask.shape[1] > edge and bool(changed.any()):
            raise ValueError(
                f"{type(model).__name__} encodes the positions of a whole batch by its longest row where that has more "
                f"than {edge} tokens ({name}); these rows have {int(lengths.min())} to {mask.shape[1]}, and the "
                "shorter would come out as they do not alone: use batch_size=1"
            )


def rounds(
    plans: Sequence[Plan | None], lengths: Sequence[int], batch_size: int, numbers: Sequence[int] | None = None
) -> list[tuple[list[Plan], list[list[int]]]]:
    """Split rows with these plans and lengths into rounds: (at most `batch_size` distinct plans, the numbers of their
    rows in `batches`). Rows without a plan are the first round, which may be empty. `numbers`: which rows (all)."""
    numbers = range(len(plans)) if numbers is None else numbers
    different, size, split = distinct(plans[number] for number in numbers), max(batch_size, 1), []
    for some in ([], *(different[i : i + size] for i in range(0, len(different), size))):
        ids = {id(plan) for plan in some} or {id(None)}
        mine = [number for number in numbers if id(plans[number]) in ids]
        groups = batches([lengths[number] for number in mine], batch_size)
        split.append((some, [[mine[index] for index in group] for group in groups]))
    return split
