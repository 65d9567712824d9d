"""Files of the usual data sets, written as their projects write them."""

from __future__ import annotations

import csv
import json

import pytest

from faststeer.behaviours import DatasetRow, pairs_of, read_records
from faststeer.extract.pairs import Pair


def table(path, header, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_advbench(tmp_path):
    path = table(tmp_path / "a.csv", ["goal", "target"], ['Write, "now"\nand here', "Sure"], ["Steal", "Sure, here"])
    expected = [DatasetRow('Write, "now"\nand here', "Sure"), DatasetRow("Steal", "Sure, here")]
    assert read_records(path) == expected


def test_jailbreakbench(tmp_path):
    header = ["Index", "Goal", "Target", "Behavior", "Category", "Source"]
    path = table(
        tmp_path / "j.csv", header, ["0", "Write it", "Sure, here is it", "Defamation", "Harassment", "Original"]
    )
    assert read_records(path) == [DatasetRow("Write it", "Sure, here is it")]


def test_harmbench_puts_the_context_first(tmp_path):
    header = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]
    rows = (
        ["Do it", "standard", "illegal", "", "", "do_it"],
        ["Sum up", "contextual", "x", "context", "A text.", "sum"],
    )
    path = table(tmp_path / "h.csv", header, *rows)
    assert read_records(path) == [DatasetRow("Do it"), DatasetRow("A text.\n\n---\n\nSum up")]


@pytest.mark.parametrize("lines", [False, True])
def test_alpaca(tmp_path, lines):
    rows = [
        {"instruction": "Add up.", "input": "1, 2", "output": "3"},
        {"instruction": "Name \u00e9", "input": "", "output": "\u00e9"},
    ]
    path = tmp_path / ("a.jsonl" if lines else "a.json")
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    expected = [DatasetRow("Add up.\n\n1, 2", "3"), DatasetRow("Name \u00e9", "\u00e9")]
    assert read_records(path) == expected


def test_caa(tmp_path):
    rows = [
        {
            "question": "Are you one?\n\nChoices:\n (A) Yes\n (B) No",
            "answer_matching_behavior": "(A)",
            "answer_not_matching_behavior": "(B)",
        }
    ]
    (tmp_path / "generate_dataset.json").write_text(json.dumps(rows))
    assert pairs_of(read_records(tmp_path / "generate_dataset.json")) == [Pair(rows[0]["question"], "(A)", "(B)")]
    assert read_records(tmp_path / "generate_dataset.json")[0].rejected == "(B)"


AXBENCH = [
    {"input": "Q1", "output": "with", "output_concept": "the sea", "category": "positive", "concept_id": 4},
    {"input": "Q2", "output": "with too", "output_concept": "the sea", "category": "positive", "concept_id": 4},
    {"input": "Q1", "output": "without", "output_concept": "EEEEE", "category": "negative", "concept_id": -1},
    {"input": "Q3", "output": "none", "output_concept": "EEEEE", "category": "negative", "concept_id": -1},
]
OTHER = {"input": "Q9", "output": "o", "output_concept": "trees", "category": "positive", "concept_id": 5}


def test_axbench(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(AXBENCH))
    expected = [
        DatasetRow("Q1", "with", "without", "positive"),
        DatasetRow("Q2", "with too", None, "positive"),
        DatasetRow("Q3", "none", None, "negative"),
    ]
    assert read_records(path) == expected
    path.write_text(json.dumps([*AXBENCH, OTHER]))
    for concept in ("the sea", 4):
        assert read_records(path, concept=concept) == expected
    with pytest.raises(ValueError, match="has 2 concepts, such as"):
        read_records(path)
    with pytest.raises(ValueError, match="has no concept 'hills': it has 'the sea', 'trees'"):
        read_records(path, concept="hills")
    twice = [*AXBENCH, AXBENCH[2] | {"output": "another"}]  # of two negative answers to a prompt none is lost
    path.write_text(json.dumps(twice))
    assert read_records(path) == [*expected[:2], DatasetRow("Q1", "another", None, "negative"), expected[2]]
    for name in ("input", "output", "output_concept"):
        path.write_text(json.dumps([AXBENCH[0], {key: value for key, value in AXBENCH[1].items() if key != name}]))
        with pytest.raises(ValueError, match=f"row 2: its {name} is blank"):
            read_records(path)
    path.write_text(json.dumps([AXBENCH[0] | {"category": "maybe"}]))
    with pytest.raises(ValueError, match="row 1: its category is 'maybe'"):
        read_records(path)


def test_data_sets_by_name_are_read_by_the_library(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    table(tmp_path / "data" / "train.csv", ["goal", "target"], ["Steal", "Sure"])
    table(tmp_path / "data" / "test.csv", ["goal", "target"], ["Forge", "Sure"], ["Burn", "Sure"])
    assert read_records(f"datasets:{tmp_path / 'data'}") == [DatasetRow("Steal", "Sure")]
    assert [r.prompt for r in read_records(f"datasets:{tmp_path / 'data'}@test")] == ["Forge", "Burn"]
    with pytest.raises(ValueError, match="cannot be loaded by datasets"):
        read_records(f"datasets:{tmp_path / 'nothing'}")


def test_without_the_library_it_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the library datasets: pip install datasets"):
        read_records("datasets:some/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "has the columns x, y, which are no known layout's"),
        ("a.csv", "goal,target\n", "has no rows"),
        ("a.csv", "", "is empty"),
        ("a.csv", "goal,Goal,target\na,b,c\n", "names a column twice"),
        ("a.csv", "goal,target\na,b,c\n", "line 2 has 3 cell"),
        ("a.csv", 'goal,target\n"a,b\n', "no CSV"),
        ("a.csv", "goal,target\n ,b\n", "row 1: its goal is blank"),
        ("a.json", "{}", "holds an object with nothing: expected a list"),
        ("a.json", "[1]", "row 1 is a int"),
        ("a.json", "[", "no valid JSON"),
        ("a.json", '[{"goal": 3, "target": "x"}]', "its goal is of type int"),
        ("a.xml", "x", "ends in '.xml'"),
        ("a.csv", b"goal,target\n\xff\xfe,b\n", "no UTF-8"),
    ],
)
def test_files_of_no_layout(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder"):
        read_records(tmp_path)
