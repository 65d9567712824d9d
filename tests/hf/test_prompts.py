"""Prompt files of every kind, the complaints about those that are none, and where an instruction ends."""

from __future__ import annotations

import csv
import json

import pytest
import tiny_chat
from hypothesis import given
from hypothesis import strategies as st

from faststeer.extract import load_contrast, load_prompts, post_instruction_positions
from faststeer.hf import render
from faststeer.hf.batching import encode

CHAT = [{"role": "user", "content": "Bake a cake"}]
TEXTS = ["How do I bake?", 'Say "hi", twice', "Zwei\nZeilen \u2028 \u00fc"]


def write(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def test_json_lists(tmp_path):
    for items in (
        TEXTS,
        [{"id": 7, "instruction": text} for text in TEXTS],
        [{"Goal": text, "target": "Sure"} for text in TEXTS],
    ):
        assert load_prompts(write(tmp_path / "a.json", json.dumps(items))) == TEXTS
    assert load_prompts(write(tmp_path / "a.json", json.dumps([CHAT, {"messages": CHAT}, "x"]))) == [CHAT, CHAT, "x"]


def test_json_named_lists(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"harmful": TEXTS, "harmless": [{"text": "a"}], "note": "mine"}))
    assert load_prompts(path, name="harmless") == ["a"]
    assert load_contrast(path) == (TEXTS, ["a"])
    assert load_contrast(path, positive="harmless", negative="harmful") == (["a"], TEXTS)


def test_json_lines(tmp_path):
    lines = [json.dumps(TEXTS[0]), "", json.dumps({"question": TEXTS[1]}), json.dumps(CHAT)]
    assert load_prompts(write(tmp_path / "a.jsonl", "\r\n".join(lines))) == [TEXTS[0], TEXTS[1], CHAT]


def test_plain_text(tmp_path):
    content = "\ufeffOne \u2028 line\r\n\r\n  two \nthree\x0cstill three"
    assert load_prompts(write(tmp_path / "a.txt", content)) == ["One \u2028 line", "two", "three\x0cstill three"]


@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize("header", [["id", "Prompt"], ["goal", "text"], ["x", "mine"]])
def test_tables(tmp_path, ending, delimiter, header):
    path = tmp_path / f"a{ending}"
    chosen = {"Prompt": 1, "text": 0, "mine": 1}[header[1]]
    header = ["text", "goal"] if header == ["goal", "text"] else header
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        for text in TEXTS:
            writer.writerow(["7", text] if chosen else [text, "7"])
    assert load_prompts(path, field="mine" if "mine" in header else None) == TEXTS


def test_the_only_column_is_named_too(tmp_path):
    """Its first line may be a prompt, or two columns with a semicolon between."""
    assert load_prompts(write(tmp_path / "a.csv", "Prompt\nHow?\nWhy?\n")) == ["How?", "Why?"]
    assert load_prompts(write(tmp_path / "a.csv", "strange\nHow?\nWhy?\n"), field="strange") == ["How?", "Why?"]
    for content in ("How?\nWhy?\n", "prompt;kind\nHow?;1\nWhy?;2\n"):
        with pytest.raises(
            ValueError, match=r"line 2 has the fields '(How\?|prompt;kind)', and none of prompt, .*field="
        ):
            load_prompts(write(tmp_path / "a.csv", content))


@pytest.mark.parametrize("ending", ["TXT", "Json", "JSONL", "CSV", "TSV"])
def test_endings_in_capitals(tmp_path, ending):
    content = {"TXT": "a b", "Json": '["a b"]', "JSONL": '"a b"', "CSV": "prompt\na b", "TSV": "id\tprompt\n1\ta b"}
    assert load_prompts(write(tmp_path / f"a.{ending}", content[ending])) == ["a b"]


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1).filter(str.strip), min_size=1)
)
def test_every_kind_gives_back_what_was_written(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("kinds")
    assert load_prompts(write(folder / "a.json", json.dumps(texts, ensure_ascii=False))) == texts
    lines = "\n".join(json.dumps(text) for text in texts)
    assert load_prompts(write(folder / "a.jsonl", lines)) == texts
    if not any("\0" in text for text in texts):
        with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(
                [["n", "prompt"], *([i, text] for i, text in enumerate(texts))]
            )
        assert load_prompts(folder / "a.csv") == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "line 1, column 1: no valid JSON"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', r"line 2, column 1: .*one value per line. Name it \.jsonl"),
        ("a.csv", "prompt\n" + "x" * 200_000, r"line 2: no CSV .*field limit.*or write \.jsonl"),
        ("a.jsonl", "\n", "holds no prompts"),
        ("a.csv", "Prompt,id,prompt,,\na,1,b,,\n", "line 1 names a column twice: 'Prompt', 'id', 'prompt'"),
        ("a.txt", "fine\nred\n".encode("utf-16-le"), "line 1: it holds zero bytes, as text in UTF-16 does"),
        ("a.txt", " \n\n", "holds no prompts"),
        ("a.json", "[]", "a.json holds no prompts"),
        ("a.json", '["a",\n "b"', "line 2, column 5: no valid JSON"),
        ("a.json", '["a", ""]', "item 2 is blank"),
        ("a.json", '["a", 3]', "item 2 is of type int"),
        ("a.json", '[{"title": "a"}]', r"item 1 has the fields 'title', and none of prompt, .*field="),
        ("a.json", '[{"role": "user", "content": "a"}]', "item 1 has the fields 'role', 'content', and none of prompt"),
        ("a.json", '[[{"role": "user"}]]', "item 1 holds .*, which is no message"),
        (
            "a.json",
            '{"one": ["a"]}',
            "holds an object with 'one': expected a list; load_prompts takes one of several by name=",
        ),
        ("a.json", '[{"chat": "a text"}]', "item 1 has the fields 'chat', and none of prompt"),
        ("a.csv", "chat\na text\n", "line 2 has the fields 'chat', and none of prompt"),
        ("a.json", "7", "holds a int: expected a list"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '"a"\n\n{"b": ', "line 3, column 7: no valid JSON"),
        ("a.jsonl", '"a"\n{"b": 1}', r"line 2 has the fields 'b'"),
        ("a.csv", "id,other\n1,b\n", r"line 2 has the fields 'id', 'other', and none of prompt"),
        ("a.csv", "id,prompt\n", "holds no prompts"),
        ("a.csv", "id,prompt\n1,How, then?\n", r"line 2 has 3 cell\(s\), the header 2"),
        ("a.csv", "id,prompt\n1,ok\n\n2, \n", "line 4, 'prompt' is blank"),
        ("a.csv", 'id,prompt\n1,"two\nlines"\n2,"open\n', r"line \d: no CSV"),
        ("a.csv", 'id,prompt\n1,"two\nlines"\n2,\n', "line 4, 'prompt' is blank"),
        ("a.txt", b"fine\ncaf\xe9\n", "line 2: byte 8 .0xe9. is no UTF-8"),
        ("a.json", '["a"]'.encode("utf-16"), "it is text in UTF-16"),
        ("a.json", b'[\n"\xe9"]', "line 2: byte 3 .0xe9. is no UTF-8"),
        ("a.parquet", "x", r"ends in '.parquet': expected one of .json, .jsonl, .csv, .tsv, .txt"),
    ],
)
def test_files_that_cannot_be_understood(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)


def test_missing_fields_and_names(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,other\na,b\n")
    with pytest.raises(ValueError, match="line 2 has the fields 'prompt', 'other', and no 'goal'"):
        load_prompts(path, field="goal")
    path = write(tmp_path / "a.json", '[{"prompt": "a"}]')
    with pytest.raises(ValueError, match="item 1 has the fields 'prompt', and no 'goal'"):
        load_prompts(path, field="goal")
    with pytest.raises(ValueError, match="no named lists, so there is no 'harmful'"):
        load_prompts(path, name="harmful")
    with pytest.raises(ValueError, match="plain text and has no field 'goal'"):
        load_prompts(write(tmp_path / "a.txt", "a"), field="goal")
    with pytest.raises(ValueError, match=r"only a \.json file holds several"):
        load_prompts(tmp_path / "a.txt", name="harmful")


def test_contrasts_that_are_none(tmp_path):
    path = write(tmp_path / "a.json", '{"good": ["a"], "bad": ["b"], "harmful": ["c"]}')
    with pytest.raises(ValueError, match="the lists 'positive' and 'negative' or 'harmful' and 'harmless'"):
        load_contrast(path)
    with pytest.raises(ValueError, match="the lists 'good' and 'evil'"):
        load_contrast(path, positive="good", negative="evil")
    with pytest.raises(ValueError, match="both positive= and negative="):
        load_contrast(path, positive="good")
    with pytest.raises(ValueError, match=r"holds no named lists: expected .* an object with the lists"):
        load_contrast(write(tmp_path / "b.json", "[1]"))
    with pytest.raises(ValueError, match="'bad' holds no prompts"):
        load_contrast(write(tmp_path / "c.json", '{"good": ["a"], "bad": []}'), positive="good", negative="bad")
    with pytest.raises(ValueError, match=r"expected a \.json file"):
        load_contrast(write(tmp_path / "a.txt", "a"))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_prompts(tmp_path / "none.json")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(FileNotFoundError, match="a folder"):
        load_prompts(tmp_path / "folder.txt")


# Where the instruction ends


def after_instruction(tokenizer, instruction):
    """How many tokens begin behind the instruction's last character, by the tokenizer's own offsets."""
    text = render(tokenizer, [instruction])[0]
    end = text.rindex(instruction) + len(instruction)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert encode(tokenizer, [instruction])[0] == tokenizer(text, add_special_tokens=False)["input_ids"]
    return sum(start >= end for start, _ in offsets)


INSTRUCTIONS = ["Bake a cake", "Why?", "3 + 4 =", "(so)", "yes.", "Say: no!\n"]
TEMPLATES = {
    "chatml": tiny_chat.CHATML,
    "inst": tiny_chat.INST,
    "spoken": (
        "{% for m in messages %}USER: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "closing mark": "{% for m in messages %}Q: {{ m['content'] }}.\n\nA:{% endfor %}",
}


@pytest.mark.parametrize("make", [tiny_chat.bpe_tokenizer, tiny_chat.sentencepiece_like_tokenizer])
@pytest.mark.parametrize("template", TEMPLATES)
def test_positions_are_those_behind_the_instruction(make, template):
    tokenizer = make(TEMPLATES[template])
    positions = post_instruction_positions(tokenizer)
    assert positions == list(range(-len(positions), 0))
    assert {after_instruction(tokenizer, instruction) for instruction in INSTRUCTIONS} == {len(positions)}


def test_a_token_that_an_instruction_merges_into_is_left_out():
    tokenizer = tiny_chat.bpe_tokenizer(TEMPLATES["closing mark"], more_text=["Why?. How?. What?. Who?."])
    counts = {instruction: after_instruction(tokenizer, instruction) for instruction in INSTRUCTIONS}
    assert counts["Why?"] == counts["Bake a cake"] - 1, "the tokenizer does not merge the two marks"
    assert len(post_instruction_positions(tokenizer)) == counts["Why?"]


def test_without_template_or_suffix_there_is_the_last_token():
    assert post_instruction_positions(tiny_chat.bpe_tokenizer(None)) == [-1]
    bare = tiny_chat.bpe_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert post_instruction_positions(bare) == [-1]
