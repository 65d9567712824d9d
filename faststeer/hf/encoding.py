"""The one place that calls a tokenizer or a chat template on a prompt's text.

A tokenizer may append an end-of-sequence token, and a chat template may drop, trim or change what it is given, both
without a word. Here only the special tokens in front of a text are kept, each message is looked for in what the
template wrote, and markup inside a message is refused. Nothing here changes the tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from faststeer.vector import check_text

Chat = Sequence[dict[str, str]]
End = Literal["prompt", "begun", "closed"]  # an answer is to follow; the last message is continued; neither


class Rendered(str):
    """A prompt that holds the chat template's markup already, and is taken as it is."""


REMEDY = "write the prompt as the model expects it yourself, with its special tokens, and give it with rendered=True"
CORRECT = "correct tokenizer.chat_template"
# Behind a message's text it shows where that is written: in no text nor template, and the same in capitals or escaped.
NUMBER = "74039184462509"
LETTERS = 2  # special tokens of fewer characters, such as a line feed, are no markup
BRACKETED = re.compile(r"<<?[^<>\s]{1,40}>?>|\[/?[A-Z][A-Z_]{0,30}\]")
THINKING = re.compile(r"think|thought|reason|analysis|reflect", re.IGNORECASE)
CLOSED_THINKING = re.compile(
    r"(?:</|\[/|<\|(?:/|end_of_|end_))[\w:| -]{0,20}(?:think|thought|reason|analysis|reflect)[\w:-]{0,20}(?:\|?>|\])",
    re.IGNORECASE,
)
CODED_ROLES = frozenset({"system", "user", "assistant", "developer"})  # others' texts may be written as JSON strings


# Plain texts ----------------------------------------------------------------------------------------------------------


def encode_texts(tokenizer: Any, texts: Sequence[str], *, begin: bool = True) -> list[list[int]]:
    """Return the token ids of texts without a chat template.

    Args:
        begin: put in front what the tokenizer puts there (a begin-of-sequence token, say), unless the text begins with
            it; never what it appends. False: the text's own tokens alone, as for a completion.

    Raises:
        ValueError: a processor instead of a tokenizer; a tokenizer that writes the text itself in other tokens when it
            adds special ones.
    """
    own, _, front = _own_tokens(tokenizer, texts)
    if not begin:
        return own
    for text, ids, whole in zip(texts, own, _call(tokenizer, texts, True), strict=True):
        if whole[: len(front) + len(ids)] != front + ids and whole[: len(ids)] != ids:
            raise ValueError(
                f"{text[:60]!r}: {type(tokenizer).__name__} gives it the tokens {whole[:8]}... with special tokens and "
                f"{ids[:8]}... without, so which ones stand in front cannot be told: give token ids instead of texts"
            )
    return [_after(tokenizer, front, ids) for ids in own]


def encode_rendered(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompts that hold the chat template's markup: texts as `apply_template` returns them, and
    `Rendered` ones. These may lack the special tokens that the template begins with, which are put in front.

    Raises:
        ValueError: a tokenizer that reads special tokens as plain text; a text that is no valid Unicode.
    """
    if getattr(tokenizer, "split_special_tokens", False):
        raise ValueError(
            "the tokenizer reads the chat template's special tokens as plain text: set tokenizer.split_special_tokens "
            "= False"
        )
    own, front, begin = _own_tokens(tokenizer, texts)
    fronts = [front] * len(own)
    if any(isinstance(text, Rendered) for text in texts):
        with suppress(ValueError):  # a template that takes no single message: then it is not known how it begins
            example = apply_template(tokenizer, [{"role": "user", "content": "Hello"}], "prompt", "an example")
            if _own_tokens(tokenizer, [example])[0][0][: len(begin)] == begin:
                fronts = [begin if isinstance(text, Rendered) else front for text in texts]
    return [_after(tokenizer, *each) for each in zip(fronts, own, strict=True)]


def _after(tokenizer: Any, front: list[int], ids: list[int]) -> list[int]:
    """Token ids behind those of `front`, unless they begin with these; never two begin-of-sequence tokens."""
    ids = ids if ids[: len(front)] == front else front + ids
    begin = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError for what is no tokenizer, such as a multimodal processor, whose first argument is images, and
    for one that writes chats without a template: what it makes of a text cannot be seen."""
    name, inner = type(tokenizer).__name__, getattr(tokenizer, "tokenizer", None)
    if inner is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError(
            f"{name} is a processor, no tokenizer: give the tokenizer in it, processor.tokenizer; if that has no chat "
            "template, set processor.tokenizer.chat_template = processor.chat_template"
        )
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ValueError(f"tokenizer is a {name}: expected what AutoTokenizer.from_pretrained or fs.load returns")
    writes = getattr(type(tokenizer), "apply_chat_template", None)
    if not has_template(tokenizer) and writes not in (None, PreTrainedTokenizerBase.apply_chat_template):
        raise ValueError(
            f"{name} writes chats by itself, without a chat template: give a tokenizer that has the model's, for one "
            "of mistral-common AutoTokenizer.from_pretrained(name, mistral_format=False)"
        )


def _call(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    check_tokenizer(tokenizer)
    for text in texts:
        check_text(text, repr(text[:60]))
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=special)["input_ids"]] if texts else []


def _own_tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[int], list[int]]:
    """Each text's tokens without special ones around it; and the special tokens that the tokenizer puts before every
    text although asked not to, and when asked to.

    These are found on a text of one letter; where that has no tokens, on the first of `texts` that has some and holds
    no special token.
    """
    numbers, marks = special_ids(tokenizer), special_texts(tokenizer)
    front, back, begin = list[int](), list[int](), list[int]()
    for text in ("a", *(text for text in texts if not any(mark in text for mark in marks))):
        (ids,), (whole,) = (_call(tokenizer, [text], special) for special in (False, True))
        places = [place for place, token in enumerate(ids) if token not in numbers]
        own = ids[places[0] : places[-1] + 1] if places else []
        starts = [n for n in range(len(whole) - len(own) + 1) if whole[n : n + len(own)] == own]
        if own and len(starts) == 1:
            front, back, begin = ids[: places[0]], ids[places[-1] + 1 :], whole[: starts[0]]
            break
    encoded = _call(tokenizer, texts, False)
    encoded = [ids[len(front) :] if ids[: len(front)] == front else ids for ids in encoded]
    return [ids[: -len(back)] if back and ids[-len(back) :] == back else ids for ids in encoded], front, begin


def special_ids(tokenizer: Any) -> set[int]:
    """The special tokens' ids, without that of the token for unknown words, which stands for a text."""
    return set(_special(tokenizer)) - {getattr(tokenizer, "unk_token_id", None)}


def special_texts(tokenizer: Any) -> list[str]:
    """The special tokens as they are written, the longest first; without those of one or two characters."""
    texts = {text for text in _special(tokenizer).values() if len(text.strip()) > LETTERS}
    return sorted(texts, key=len, reverse=True)


def _special(tokenizer: Any) -> dict[int, str]:
    named = zip(getattr(tokenizer, "all_special_ids", ()), getattr(tokenizer, "all_special_tokens", ()), strict=True)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {n: str(text) for n, text in named} | {n: token.content for n, token in added.items() if token.special}


# Chat templates -------------------------------------------------------------------------------------------------------


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def apply_template(tokenizer: Any, chat: Chat, end: End, what: str) -> str:
    """Return a chat as the tokenizer's template writes it, every message's text in it.

    Templates that read a message as a list of parts get one. White space around a message may be trimmed, and an
    earlier answer's thinking dropped, as the template has it. `what` names the chat in errors.

    Raises:
        ValueError: a template that raises, that drops or changes a message's text, drops tool calls, or ends a prompt
            before what it begins an answer with.
    """
    check_tokenizer(tokenizer)
    marked = [message | {"content": f"{message['content']}{NUMBER}{i:03}"} for i, message in enumerate(chat)]
    everything = set(range(len(chat)))
    parts: set[int] = set()
    lost: list[int] = []
    failure: Exception | None = None
    tried: list[set[int]] = []
    while parts not in tried:
        tried.append(parts)
        try:
            text, check = (_written(tokenizer, messages, parts, end) for messages in (chat, marked))
        except TimeoutError:  # a signal handler's, not the template's
            raise
        except Exception as error:  # a template raises what it likes, and what the objects in it do
            failure, parts = failure or error, everything
            continue
        missing = _missing(chat, parts, end, text, check)
        if not missing:
            _check_rest(tokenizer, chat, parts, end, text, what)
            return text
        lost = lost or missing
        parts = parts | set(missing)
    fault = f"{what}: the tokenizer's chat template"
    if not lost:
        roles, reason = ", ".join(message["role"] for message in chat), " ".join(str(failure).split())[:300]
        does, mend = f"fails on messages by {roles} ({type(failure).__name__}: {reason})", f"{CORRECT}, or {REMEDY}"
        if type(failure) is TemplateError:  # by raise_exception
            does, mend = f"refuses messages by {roles} ({reason})", "give only roles it knows, in an order it allows"
        raise ValueError(f"{fault} {does}: {mend}") from failure
    message = chat[lost[0]]
    where = f"message {lost[0]} of {len(chat)}, the {message['role']}'s" if len(chat) > 1 else "the text"
    system = "put the system prompt into the user's first message, or " if message["role"] == "system" else ""
    raise ValueError(
        f"{fault} drops or changes {where} {message['content'][:60]!r}, so the model would read something else: "
        f"{system}{CORRECT}, or {REMEDY}"
    )


def _check_rest(tokenizer: Any, chat: Chat, parts: set[int], end: End, text: str, what: str) -> None:
    """Raise ValueError where a chat's template drops tool calls, or writes something before an answer and not behind
    a prompt."""
    fault = f"{what}: the tokenizer's chat template"

    def written(messages: Chat, end: End) -> str:
        try:
            return _written(tokenizer, messages, parts and parts | {*range(len(chat), len(messages))}, end)
        except TimeoutError:
            raise
        except Exception:  # a template that takes no such message there
            return ""

    bare = [{name: value for name, value in message.items() if name != "tool_calls"} for message in chat]
    if any(message.get("tool_calls") for message in chat) and written(bare, end) == text:
        raise ValueError(f"{fault} drops tool_calls: write them into the message's content, or {REMEDY}")
    if end != "prompt" or chat[-1]["role"] == "assistant" or written(chat, "closed") != text:
        return
    answer, question = (written([*chat, {"role": role, "content": NUMBER}], "closed") for role in ("assistant", "user"))
    header = answer.removeprefix(text).partition(NUMBER)[0]
    if answer.startswith(text + header + NUMBER) and header.strip() and answer != question:
        addition = "{% if add_generation_prompt %}{{ " + json.dumps(header, ensure_ascii=False) + " }}{% endif %}"
        raise ValueError(
            f"{fault} ignores add_generation_prompt: it begins an answer with {header!r}, and the prompt ends before "
            f"that: tokenizer.chat_template += {addition!r}"
        )


def _written(tokenizer: Any, chat: Chat, parts: set[int], end: End) -> str:
    messages = [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if i in parts else dict(message)
        for i, message in enumerate(chat)
    ]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=end == "prompt", continue_final_message=end == "begun"
    )


def _missing(chat: Chat, parts: set[int], end: End, text: str, check: str) -> list[int]:
    """The numbers of the messages whose text is not in what the template wrote, or is not, with a number at its end, in
    what it wrote of that (`check`): "a" is not found in "assistant", nor in another message of the same words. All, if
    a list of parts was printed as such."""
    contents, missing = " ".join(message["content"] for message in chat), []
    if parts and any(key in check and key not in contents for key in ("'text': ", '"text": ', "&#39;text&#39;: ")):
        return list(range(len(chat)))
    for i, message in enumerate(chat):
        content, role = message["content"], message["role"]
        forms = [content]
        if role == "assistant" and not (end == "begun" and i == len(chat) - 1):
            forms += [content[match.end() :] for match in CLOSED_THINKING.finditer(content)][-1:]
        if role not in CODED_ROLES:
            forms += [json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1]]
        if not any(form.strip() in text and f"{form.lstrip()}{NUMBER}{i:03}" in check for form in forms):
            missing.append(i)
    return missing


# Markup inside prompts ------------------------------------------------------------------------------------------------


def check_markup(tokenizer: Any, chats: Sequence[Chat], names: Sequence[str]) -> None:
    """Raise ValueError, with its name, for the first chat of which `markup_in` finds some."""
    for name, mark in zip(names, markup_in(tokenizer, chats), strict=True):
        if mark is not None:
            raise ValueError(
                f"{name} holds {mark!r}, which the model's chat format is made of. If the prompt was rendered already, "
                "give the bare text or a list of messages, since the chat template is applied here, or give it with "
                "rendered=True, or --rendered on the command line. If the text only mentions it, spell it otherwise: "
                "the model would read it as the beginning or the end of a message"
            )


def markup_in(tokenizer: Any, chats: Sequence[Chat]) -> list[str | None]:
    """Of each chat what only the chat template may write, None where its messages hold nothing of that: special tokens,
    the marks that the template puts around messages, or the words it begins and ends a prompt with.

    An assistant's message may hold marks of thinking, which templates read.
    """
    marks, head, tail = _marks(tokenizer)
    numbers = special_ids(tokenizer)
    contents = list(dict.fromkeys(text for chat in chats for message in chat for text in _texts(message)))
    tokens = dict(zip(contents, _own_tokens(tokenizer, contents)[0], strict=True))

    def marks_of(message: dict[str, str]) -> Iterator[str]:
        thinking = message["role"] == "assistant"
        for text in _texts(message):
            of_tokens = (tokenizer.decode([i]) for i in tokens[text] if i in numbers)
            for mark in (*(mark for mark in marks if mark in text), *of_tokens):
                if len(mark.strip()) > LETTERS and not (thinking and THINKING.search(mark)):
                    yield mark
        text = message["content"].strip()
        if head and not thinking and text.startswith(head) and text.endswith(tail):
            yield f"{head} ... {tail}"

    return [next((mark for message in chat for mark in marks_of(message)), None) for chat in chats]


def _texts(message: Mapping[str, Any]) -> list[str]:
    """A message's texts: its content, role, and whatever else a template may write, such as a name."""
    return [value for value in message.values() if isinstance(value, str)]


def _marks(tokenizer: Any) -> tuple[list[str], str, str]:
    """What the template writes around messages: tokens and bracketed words; and, where there are none next to a user's
    message, the words before and behind it."""
    texts = {"system": f"Kind words{NUMBER}", "user": f"Hello there{NUMBER}", "assistant": f"Good day{NUMBER}"}
    written: list[str] = []
    head = tail = ""
    for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
        chat = [{"role": role, "content": texts[role]} for role in roles]
        try:
            text = apply_template(tokenizer, chat, "prompt", "an example prompt")
        except ValueError:  # such as a template without system prompts; the prompts themselves are checked elsewhere
            continue
        pieces = re.split("|".join(texts.values()), text)
        written += pieces
        if roles == ("user",):
            head, tail = pieces[0], pieces[-1]
    markup = "\n".join(written)
    added = [token for token in tokenizer.get_added_vocab() if len(token.strip()) > LETTERS and token in markup]
    marks = list(dict.fromkeys([*special_texts(tokenizer), *added, *BRACKETED.findall(markup)]))
    begin = getattr(tokenizer, "bos_token", None)
    head = (head.removeprefix(begin) if begin else head).strip().rpartition("\n")[2]
    tail = tail.strip()
    if min(len(head), len(tail)) < LETTERS or any(mark in head + tail for mark in marks):
        head = tail = ""
    return marks, head, tail
