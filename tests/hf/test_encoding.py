"""Prompts at their one door: what tokenizers append is left out, what templates drop is told, markup is refused.

The oracles are token ids and texts written down by hand for a vocabulary of whole words.
"""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import faststeer as fs
from faststeer.evaluate import complete
from faststeer.evaluate.multiple_choice import plain_pair
from faststeer.evaluate.side_effects import text_effects
from faststeer.extract import dim
from faststeer.extract.pairs import encode_completions, turn_end
from faststeer.hf.batching import encode, render, tokenize
from faststeer.hf.encoding import encode_texts

SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "<|open|>", "<|close|>"]
WORDS = [
    *SPECIAL,
    "red",
    "green",
    "blue",
    "sky",
    "grass",
    "[Q]",
    "[A]",
    "Asked:",
    "Answer:",
    "sys:",
    "&lt;",
    "<",
    "RED",
]
ID = {word: number for number, word in enumerate(WORDS)}


def ids(text: str) -> list[int]:
    return [ID.get(word, 0) for word in text.split()]


def words_tokenizer(single: str = "$A", template: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """Whole words; `single` is what the post-processor makes of a text."""
    core = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single != "$A":
        core.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(word, ID[word]) for word in single.split() if word != "$A"]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **named)
    tokenizer.chat_template = template
    return tokenizer


def template(user: str, generation: str = "[A]", before: str = "", rest: str = "") -> str:
    other = rest or " [A] {{ m.content }}"
    messages = (
        "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}" + other + "{% endif %}{% endfor %}"
    )
    return before + messages + "{% if add_generation_prompt %} " + generation + "{% endif %}"


PLAIN = template("[Q] {{ m.content }}")


# Special tokens in front, and nowhere else ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("single", "named", "front"),
    [
        ("$A [SEP]", {"sep_token": "[SEP]"}, ""),
        ("[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]"}, "[CLS]"),
        ("[CLS] <|open|> $A <|close|> [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]"}, "[CLS] <|open|>"),
        ("<|open|> $A", {"bos_token": "<|open|>"}, "<|open|>"),
        ("$A <|close|>", {}, ""),  # appended by the post-processor, and named nowhere
    ],
)
def test_only_what_stands_in_front_is_kept(single, named, front):
    tokenizer = words_tokenizer(single, **named)
    assert encode(tokenizer, ["red sky", "grass"]) == [ids(f"{front} red sky"), ids(f"{front} grass")]
    assert encode_texts(tokenizer, ["red sky"], begin=False) == [ids("red sky")]
    assert encode_texts(tokenizer, []) == []
    # What is written by hand already is not put there again.
    assert encode(tokenizer, [f"{front} red"]) == [ids(f"{front} red")]
    assert tokenize(tokenizer, ["red sky", "grass"])["attention_mask"].tolist()[1][-1] == 1


def test_words_that_are_unknown_are_the_texts_own():
    tokenizer = words_tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")
    assert encode(tokenizer, ["mauve", "mauve red mauve"]) == [ids("[CLS] [UNK]"), ids("[CLS] [UNK] red [UNK]")]


def test_a_tokenizer_that_adds_tokens_although_asked_not_to():
    class Stubborn(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__(text, **(options | {"add_special_tokens": True}))

    plain = words_tokenizer("<|open|> $A <|close|>")
    tokenizer = Stubborn(
        tokenizer_object=plain.backend_tokenizer, unk_token="[UNK]", bos_token="<|open|>", eos_token="<|close|>"
    )
    assert encode(tokenizer, ["red sky"]) == [ids("<|open|> red sky")]
    assert encode_texts(tokenizer, ["red"], begin=False) == [ids("red")]
    tokenizer.chat_template = template("[Q] {{ m.content }}", before="<|open|> ")
    assert encode(tokenizer, ["red"]) == [ids("<|open|> [Q] red [A]")]


def test_a_begin_of_sequence_token_on_top_of_the_templates():
    tokenizer = words_tokenizer(
        "<|open|> $A", template("[Q] {{ m.content }}", before="<|open|> "), bos_token="<|open|>"
    )
    assert encode(tokenizer, ["red"]) == [ids("<|open|> [Q] red [A]")]
    twice = words_tokenizer("$A", template("[Q] {{ m.content }}", before="<|open|> <|open|> "), bos_token="<|open|>")
    assert encode(twice, ["red"]) == [ids("<|open|> [Q] red [A]")]


def test_a_tokenizer_that_cuts_texts_otherwise_with_special_tokens():
    class Odd(PreTrainedTokenizerFast):
        def __call__(self, text, add_special_tokens=True, **options):
            found = super().__call__(text, add_special_tokens=False, **options)
            if add_special_tokens:
                found["input_ids"] = [[ID["[CLS]"], *reversed(row)] for row in found["input_ids"]]
            return found

    tokenizer = Odd(tokenizer_object=words_tokenizer().backend_tokenizer, unk_token="[UNK]", cls_token="[CLS]")
    assert encode(tokenizer, ["red"]) == [ids("[CLS] red")]
    with pytest.raises(ValueError, match=r"'red sky': Odd gives it the tokens .*give token ids"):
        encode(tokenizer, ["red sky"])


def tiny(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, eos_token_id=ID["[SEP]"], pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_vectors_answers_and_likelihoods_begin_at_the_last_word():
    tokenizer = words_tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", eos_token="[SEP]")
    model = tiny(tokenizer)
    sides = (["red sky", "red grass"], ["blue sky", "green grass"])
    states = [
        model(torch.tensor([ids(f"[CLS] {text}") for text in side]), output_hidden_states=True).hidden_states
        for side in sides
    ]
    vector = dim(model, tokenizer, *sides)
    for layer in (0, 1):
        means = [side[layer][:, -1].double().mean(0) for side in states]
        if bool((means[0] - means[1]).any()) and layer in vector:
            assert torch.allclose(vector[layer].double(), means[0] - means[1], atol=1e-6)
    # Answers follow the word, greedily, by hand.
    row = ids("[CLS] red sky")
    for _ in range(3):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    engine = fs.Engine(model, tokenizer, max_batch=1, max_length=16)
    (answer,) = engine.generate(["red sky"], max_new_tokens=3, progress=False)
    want = row[3 : row.index(2, 3)] if 2 in row[3:] else row[3:]
    assert list(answer.token_ids)[: len(want)] == want
    assert plain_pair(tokenizer, "red", " sky") == (ids("[CLS] red"), ids("sky"))
    (effect,) = text_effects(model, tokenizer, [None], ["red sky grass"])
    assert effect.tokens == (3,) or sum(effect.tokens) == 3  # the words behind [CLS], no [SEP]


def test_tokens_that_the_model_does_not_have():
    """The tokenizer of another model; on a GPU the lookup would leave the process without it."""
    tokenizer = words_tokenizer("[CLS] $A", cls_token="[CLS]")
    model = tiny(tokenizer)
    model.resize_token_embeddings(6)
    with pytest.raises(ValueError, match=r"the token 10: the model has 0 to 5; is the tokenizer another model's"):
        dim(model, tokenizer, ["red", "[Q]"], ["sky", "grass"])


def test_a_padding_token_that_was_added_without_the_model():
    tokenizer = words_tokenizer("[CLS] $A", cls_token="[CLS]")
    common = " ".join(["sky"] * 12)  # run once for all prompts
    model, sides = (
        tiny(tokenizer),
        ([f"{common} red", f"{common} green blue red"], [f"{common} grass", f"{common} blue"]),
    )
    expected = dim(model, tokenizer, *sides)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id == len(WORDS)
    vector = dim(model, tokenizer, *sides)
    assert all(torch.equal(vector[layer], expected[layer]) for layer in expected.layers)


# What templates do to messages ----------------------------------------------------------------------------------------

ALTERED = {
    "upper case": ("[Q] {{ m.content | upper }}", "red sky", False),
    "escaped": ("[Q] {{ m.content | e }}", "sky < grass", False),
    "escaped, without anything to escape": ("[Q] {{ m.content | e }}", "sky grass", True),
    "cut short": ("[Q] {{ m.content[:20] }}", "red " * 10, False),
    "short enough": ("[Q] {{ m.content[:40] }}", "red", True),
    "line feeds replaced": ("[Q] {{ m.content | replace('\\n', ' ') }}", "red\nsky", False),
    "dropped": ("[Q]", "red", False),
    "dropped, but the template has the word": ("[Q] red", "red", False),
    "trimmed": ("[Q] {{ m.content | trim }}", " red sky\n", True),
    "as a JSON string": ("[Q] {{ m.content | tojson }}", 'red "sky"', False),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_text_that_the_template_changes_is_told(name):
    user, text, right = ALTERED[name]
    tokenizer = words_tokenizer(template=template(user))
    if right:
        assert render(tokenizer, [text]) == [f"[Q] {text.strip()} [A]"]
    else:
        with pytest.raises(ValueError, match=r"prompts\[.\]: .* drops or changes the text .*rendered=True"):
            render(tokenizer, ["7" if "{{" in user else text, text])


def test_the_remedy_works():
    tokenizer = words_tokenizer(template=template("[Q] {{ m.content | upper }}"))
    with pytest.raises(ValueError, match="with rendered=True"):
        encode(tokenizer, ["red sky"])
    assert encode(tokenizer, ["[Q] red sky [A]"], rendered=True) == [ids("[Q] red sky [A]")]


PARTS = {
    "all": "[Q]{% for p in m.content %}{% if p.type == 'text' %} {{ p.text }}{% endif %}{% endfor %}",
    "the first alone": "[Q] {{ m.content[0]['text'] }}",
    "refuses texts": (
        "{% if m.content is string %}{{ raise_exception('a list') }}{% endif %}[Q] {{ m.content[0].text }}"
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_templates_that_read_parts_get_parts(name):
    # The system prompt is read as a text: each message gets what it needs.
    tokenizer = words_tokenizer(template=template(PARTS[name], rest="sys: {{ m.content | trim }} "))
    assert render(tokenizer, ["red sky"]) == ["[Q] red sky [A]"]
    if name != "refuses texts":
        assert render(tokenizer, ["red"], system="green") == ["sys: green [Q] red [A]"]


def test_a_list_of_parts_is_never_printed_as_such():
    tokenizer = words_tokenizer(template=template("[Q] {{ m.content if m.content is not string else '' }}"))
    with pytest.raises(ValueError, match="drops or changes the text 'red'"):
        render(tokenizer, ["red"])


@pytest.mark.parametrize("given", ["system=", "message"])
def test_a_dropped_system_prompt_is_told(given):
    source = "{% for m in messages if m.role != 'system' %}[Q] {{ m.content }}{% endfor %} [A]"
    tokenizer = words_tokenizer(template=source)
    system, chat = {"role": "system", "content": "green"}, [{"role": "user", "content": "red"}]
    assert render(tokenizer, [chat]) == ["[Q] red [A]"]
    prompts, options = ([chat], {"system": "green"}) if given == "system=" else ([[system, *chat]], {})
    with pytest.raises(ValueError, match=r"message 0 of 2, the system's 'green'.*into the user's first message"):
        render(tokenizer, prompts, **options)


def test_messages_of_the_same_words_are_told_apart():
    """Only the last user's message is written; the first has the same words."""
    source = "{% for m in messages %}{% if loop.last %}[Q] {{ m.content }}{% endif %}{% endfor %} [A]"
    chat = [{"role": role, "content": text} for role, text in (("user", "red"), ("assistant", "sky"), ("user", "red"))]
    with pytest.raises(ValueError, match="message 0 of 3, the user's 'red'"):
        render(words_tokenizer(template=source), [chat])


def test_a_system_prompt_may_come_later():
    """As in templates that put it into the last user's message."""
    source = (
        "{% for m in messages if m.role != 'system' %}[Q] {% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }} {% endfor %}[A]"
    )
    assert render(words_tokenizer(template=source), ["red"], system="green") == ["[Q] green red [A]"]


@pytest.mark.parametrize("thinking", ["<think>\nsky\n</think>\n\n", "[THINK]sky[/THINK]"])
def test_earlier_answers_may_lose_their_thinking(thinking):
    closing = thinking.rstrip()[thinking.rstrip().rindex(thinking.strip()[-1]) :]
    end = "</think>" if "</think>" in thinking else "[/THINK]"
    assert closing
    rest = " [A] {{ m.content.split('" + end + "')[-1] | trim }}"
    tokenizer = words_tokenizer(template=template(" [Q] {{ m.content }}", rest=rest))
    answer = {"role": "assistant", "content": f"{thinking}grass"}
    chat = [{"role": "user", "content": "red"}, answer, {"role": "user", "content": "blue"}]
    assert render(tokenizer, [chat]) == [" [Q] red [A] grass [Q] blue [A]"]
    with pytest.raises(ValueError, match=r"prompts\[0\]"):  # what is to be continued must be there
        render(tokenizer, [chat[:2]])
    dropped = template(" [Q] {{ m.content }}", rest=" [A]")
    with pytest.raises(ValueError, match="message 1 of 3, the assistant's"):
        render(words_tokenizer(template=dropped), [chat])


def test_tools_answers_may_be_json():
    source = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content | tojson if m.role == 'tool' else m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    chat = [{"role": "user", "content": "red"}, {"role": "tool", "content": 'a "b"\n'}]
    assert render(words_tokenizer(template=source), [chat]) == ['[user] red [tool] "a \\"b\\"\\n" [assistant] ']


def test_templates_that_fail_are_told_in_words():
    with pytest.raises(ValueError, match=r"prompts\[0\]: .* fails on messages by user \(TypeError.*rendered=True"):
        render(words_tokenizer(template="{{ messages[0].content / 2 }}"), ["red"])
    with pytest.raises(ValueError, match=r"fails on messages by user .*TemplateSyntaxError"):
        render(words_tokenizer(template="{% for %}"), ["red"])
    refusing = words_tokenizer(template="{{ raise_exception('never on Sundays') }}")
    with pytest.raises(ValueError, match=r"refuses messages by user .never on Sundays"):
        render(refusing, ["red"])


def test_a_signal_handlers_timeout_is_no_fault_of_the_template(monkeypatch):
    """A handler's exception comes out wherever it strikes, here within the first writing of the template alone."""
    tokenizer = words_tokenizer(template=template("[Q] {{ m.content }}"))
    write, calls = type(tokenizer).apply_chat_template, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise TimeoutError("time is up")
        return write(*args, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", interrupted)
    with pytest.raises(TimeoutError, match="time is up"):
        render(tokenizer, ["red sky"])


def test_a_turns_end_is_found_in_templates_that_read_parts():
    source = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content[0].text }} <|close|> {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = words_tokenizer(template=source, eos_token="<|close|>")
    assert turn_end(tokenizer) == ids("<|close|>")
    appends = words_tokenizer("$A [SEP]", source, eos_token="<|close|>", sep_token="[SEP]")
    (text,) = encode_completions(appends, ["red"], ["sky"])
    assert text.completion == (ID["sky"], ID["<|close|>"])


def spoken(before_answers: str) -> str:
    """A template that does not read add_generation_prompt."""
    return (
        "{% for m in messages %}{% if m.role == 'user' %}[Q] {{ m.content }}"
        "{% else %}{{ " + json.dumps(before_answers) + " }}{{ m.content }}{% endif %}{% endfor %}"
    )


@pytest.mark.parametrize("header", ["\n[A] ", ' "Answer:" '])
def test_a_prompt_that_ends_before_what_begins_an_answer(header):
    tokenizer = words_tokenizer(template=spoken(header))
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "sky"}]
    with pytest.raises(
        ValueError, match=r"prompts\[0\]: .*ignores add_generation_prompt.*chat_template \+= "
    ) as caught:
        render(tokenizer, ["red"])
    assert render(tokenizer, [chat]) == [f"[Q] red{header}sky"]  # an answer that is continued begins as it should
    exec(str(caught.value).rpartition(": ")[2], {"tokenizer": tokenizer})
    assert render(tokenizer, ["red", chat]) == [f"[Q] red{header}", f"[Q] red{header}sky"]


@pytest.mark.parametrize("before_answers", ["", " ", "\n\n"])
def test_an_answer_may_follow_the_prompt_at_once(before_answers):
    """As in the templates of Llama 2 and Mistral; and where messages of all roles are written alike."""
    tokenizer = words_tokenizer(template=spoken(before_answers))
    assert render(tokenizer, ["red"]) == ["[Q] red"]
    alike = words_tokenizer(template="{% for m in messages %}[Q] {{ m.content }}{% endfor %}")
    assert render(alike, ["red"]) == ["[Q] red"]


def test_a_header_is_missed_where_questions_and_answers_take_turns():
    turns = "{% if loop.index0 % 2 != (m.role != 'user') %}{{ raise_exception('in turn') }}{% endif %}"
    source = spoken("[A] ").replace("{% for m in messages %}", "{% for m in messages %}" + turns)
    with pytest.raises(ValueError, match=r"begins an answer with '\[A\] '"):
        render(words_tokenizer(template=source), ["red"])


def test_a_template_for_questions_alone():
    source = (
        "{% if messages | length > 1 %}{{ raise_exception('one question') }}{% endif %}[Q] {{ messages[0].content }}"
    )
    assert render(words_tokenizer(template=source), ["red"]) == ["[Q] red"]


def test_a_blank_answer_is_not_continued():
    """transformers would cut off the line feed behind the header where the template trims messages."""
    tokenizer = words_tokenizer(template=template("[Q] {{ m.content }}", rest="[A]\n{{ m.content | trim }}"))
    for blank in ("", " \n"):
        chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": blank}]
        with pytest.raises(ValueError, match=r"prompts\[0\] ends with a blank answer: leave that message out"):
            render(tokenizer, [chat])


def test_tool_calls_are_not_dropped():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "grass", "arguments": {}}}]}
    chat = [{"role": "user", "content": "red"}, call, {"role": "tool", "content": "sky"}]
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    ending = "{% if add_generation_prompt %}[assistant] {% endif %}"
    with pytest.raises(ValueError, match=r"prompts\[0\]: .*drops tool_calls: write them into the message's content"):
        render(words_tokenizer(template=source + ending), [chat])
    writes = source.replace("{% endfor %}", "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}")
    assert render(words_tokenizer(template=writes + ending), [chat]) == [
        "[user] red[assistant] grass[tool] sky[assistant] "
    ]


@pytest.mark.parametrize("source", [None, PLAIN])
def test_texts_that_are_no_unicode_are_told(source):
    tokenizer = words_tokenizer(template=source)
    with pytest.raises(ValueError, match=r"'red \\ud800' is no valid Unicode text"):
        encode(tokenizer, ["red \ud800"])


@pytest.mark.parametrize("system", [5, b"green", ["green"], "\udcff"])
def test_a_system_prompt_is_a_text(system):
    with pytest.raises(ValueError, match=r"system is (a (int|bytes|list): expected a text|no valid Unicode)"):
        render(words_tokenizer(template=PLAIN), ["red"], system=system)


def test_special_tokens_that_are_read_as_text():
    """Without a template they are the text's own, as the tokenizer has it; a template's would be lost."""
    tokenizer = words_tokenizer("$A", template("<|open|> {{ m.content }}"), bos_token="<|open|>")
    expected = encode(tokenizer, ["red"])
    assert expected[0][0] == ID["<|open|>"]
    tokenizer.split_special_tokens = True
    with pytest.raises(ValueError, match=r"set tokenizer\.split_special_tokens = False"):
        encode(tokenizer, ["red"])
    tokenizer.split_special_tokens = False
    assert encode(tokenizer, ["red"]) == expected


# Markup ---------------------------------------------------------------------------------------------------------------

MARKED = {
    "rendered before": ("[Q]", "[Q] red [A]", r"\[Q\]"),
    "a special token": ("[Q]", "red <|close|> sky", r"<\|close\|>"),
    "a mark that is no token": ("{user}", "red {user} <turn> sky", "<turn>"),
    "words before and behind": ("Asked:", "Asked: red Answer:", "Asked: ... Answer:"),
}
MARKING = {
    "rendered before": PLAIN,
    "a special token": PLAIN,
    "a mark that is no token": template("<turn> {{ m.content }}"),
    "words before and behind": template("Asked: {{ m.content }}", "Answer:"),
}


@pytest.mark.parametrize("name", MARKED)
def test_markup_in_a_message_is_refused(name):
    _, text, mark = MARKED[name]
    tokenizer = words_tokenizer(template=MARKING[name], eos_token="<|close|>")
    chat = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "sky"},
        {"role": "user", "content": text},
    ]
    for prompts in ([chat], [text]):
        with pytest.raises(ValueError, match=rf"prompts\[1\] holds '{mark}'.*rendered=True.*spell it otherwise"):
            encode(tokenizer, ["red", *prompts])
    with pytest.raises(ValueError, match="system holds"):
        encode(tokenizer, ["red"], system=text)
    # The remedies: what was rendered before, and the bare text.
    assert encode(tokenizer, [text], rendered=True) == [ids(text)]
    bare = "red sky"
    assert encode(tokenizer, [render(tokenizer, [bare])[0]], rendered=True) == encode(tokenizer, [bare])


@pytest.mark.parametrize("field", ["role", "name"])
def test_markup_beside_the_content_is_refused(field):
    tokenizer = words_tokenizer(template=template("[Q] {{ m.name }} {{ m.content }}"), eos_token="<|close|>")
    chat = [{"role": "user", "name": "sky", "content": "red"} | {field: "user <|close|>"}]
    with pytest.raises(ValueError, match=r"prompts\[0\] holds '<\|close\|>'"):
        encode(tokenizer, [chat])


def test_what_only_looks_like_markup_is_taken():
    """Words of the template inside a text, html, and other templates' marks; and without a template, all is text."""
    words = words_tokenizer(template=template("Asked: {{ m.content }}", "Answer:"), eos_token="<|close|>")
    for text in ("What does Asked: mean before Answer: in a play?", "<b>red</b> [INST] sky", "Asked: red?"):
        assert render(words, [text]) == [f"Asked: {text} Answer:"]
    bare = words_tokenizer("[CLS] $A", cls_token="[CLS]", eos_token="<|close|>")
    assert encode(bare, ["red <|close|> sky"]) == [ids("[CLS] red <|close|> sky")]


def test_every_door_refuses_alike():
    tokenizer = words_tokenizer("$A", PLAIN, eos_token="<|close|>")
    model = tiny(tokenizer)
    engine = fs.Engine(model, tokenizer, max_batch=1, max_length=16)
    text = "[Q] red [A]"
    calls = {
        "Engine": lambda: list(engine.generate([[5, 6], "red", text], progress=False)),
        "complete": lambda: complete(model, tokenizer, ["blue", "red", text], max_new_tokens=1),
        "tokenize": lambda: tokenize(tokenizer, ["blue", "red", text]),
        "render": lambda: render(tokenizer, ["blue", "red", text]),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"prompts\[2\] holds '\[Q\]'"):
            call()
    with pytest.raises(ValueError, match=r"negative\[1\] holds '\[Q\]'"):
        dim(model, tokenizer, ["red", "sky"], ["blue", text])
    (ours,) = engine.generate([text], rendered=True, max_new_tokens=3, progress=False)
    (theirs,) = engine.generate(["red"], max_new_tokens=3, progress=False)
    assert ours.token_ids == theirs.token_ids
    assert complete(model, tokenizer, [text], rendered=True) == complete(model, tokenizer, ["red"])


def test_rendered_prompts_begin_as_the_templates_do():
    tokenizer = words_tokenizer("<|open|> $A [SEP]", template("[Q] {{ m.content }}", before="<|open|> "),
                                bos_token="<|open|>", sep_token="[SEP]")  # fmt: skip
    for text in ("<|open|> [Q] red [A]", "[Q] red [A]"):
        assert encode(tokenizer, [text], rendered=True) == encode(tokenizer, ["red"]) == [ids("<|open|> [Q] red [A]")]
    without = words_tokenizer("<|open|> $A", PLAIN, bos_token="<|open|>")  # a template that writes none
    assert encode(without, ["[Q] red [A]"], rendered=True) == encode(without, ["red"]) == [ids("[Q] red [A]")]
    with pytest.raises(ValueError, match="system= gives a system prompt"):
        encode(tokenizer, ["red"], "green", rendered=True)
    with pytest.raises(ValueError, match=r"prompts\[1\] is a chat"):
        encode(tokenizer, ["[Q] red", [{"role": "user", "content": "red"}]], rendered=True)


def test_a_tokenizer_that_writes_chats_by_itself_is_told():
    """As mistral-common's: without a template, its prompts would be plain texts."""

    class Common(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, **options):
            return super().apply_chat_template(conversation, **options)

    tokenizer = Common(tokenizer_object=words_tokenizer().backend_tokenizer, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"Common writes chats by itself.*mistral_format=False"):
        encode(tokenizer, ["red"])
    tokenizer.chat_template = PLAIN
    assert encode(tokenizer, ["red"]) == [ids("[Q] red [A]")]


def test_a_processor_is_told():
    class Processor:
        def __init__(self, inner, chat_template):
            self.tokenizer, self.chat_template = inner, chat_template

    with pytest.raises(ValueError, match=r"Processor is a processor.*processor\.tokenizer\.chat_template = "):
        encode(Processor(words_tokenizer(), PLAIN), ["red"])
    for what, name in ((None, "NoneType"), ("gpt2", "str"), (torch.nn.Linear(2, 2), "Linear")):
        with pytest.raises(ValueError, match=f"tokenizer is a {name}: expected what AutoTokenizer.from_pretrained"):
            encode(what, ["red"])
    processor = Processor(words_tokenizer(), PLAIN)
    processor.tokenizer.chat_template = processor.chat_template
    assert encode(processor.tokenizer, ["red"]) == [ids("[Q] red [A]")]
