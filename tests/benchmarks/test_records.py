"""Rows are in the file as soon as they are measured."""

import json
import os
import subprocess
import sys

import pytest
import records
import results
from benchmark_programs import BENCHMARKS


def test_each_row_is_there_at_once(tmp_path):
    append = records.Appended(tmp_path / "a.csv", ["x", "y"])
    for n in range(3):
        append({"x": n})
        assert records.read(tmp_path / "a.csv") == [{"x": str(i)} for i in range(n + 1)]


def test_rows_of_several_processes_stay_whole(tmp_path):
    path = tmp_path / "a.csv"
    code = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path; from records import Appended
append = Appended(Path({str(path)!r}), ["who", "n", "text"])
for n in range(200): append({{"who": sys.argv[1], "n": n, "text": "a, \\"b\\"" * 20}})
"""
    writers = [subprocess.Popen([sys.executable, "-S", "-c", code, str(who)]) for who in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    rows = records.read(path)
    assert sorted((int(r["who"]), int(r["n"])) for r in rows) == [(w, n) for w in range(4) for n in range(200)]
    assert {r["text"] for r in rows} == {'a, "b"' * 20}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    append = records.Appended(tmp_path / "a.csv", ["x", "y"])
    append({"x": 1, "y": 2})
    with (tmp_path / "a.csv").open("a") as file:
        file.write("3,4")
    assert records.read(tmp_path / "a.csv") == [{"x": "1", "y": "2"}]


def test_no_file_has_no_rows(tmp_path):
    assert records.read(tmp_path / "a.csv") == []


def test_an_unknown_column_is_refused(tmp_path):
    append = records.Appended(tmp_path / "a.csv", ["x"])
    with pytest.raises(ValueError, match="no column for z"):
        append({"x": 1, "z": 2})
    assert records.read(tmp_path / "a.csv") == []


def test_a_file_with_other_columns_is_refused(tmp_path):
    records.Appended(tmp_path / "a.csv", ["x"])
    records.Appended(tmp_path / "a.csv", ["x"])
    with pytest.raises(ValueError, match="name another file"):
        records.Appended(tmp_path / "a.csv", ["y"])


def test_a_writer_that_was_killed_before_its_header(tmp_path):
    (tmp_path / "a.csv").touch()
    records.Appended(tmp_path / "a.csv", ["x"])({"x": 1})
    assert records.read(tmp_path / "a.csv") == [{"x": "1"}]


def test_failures_are_counted_and_labelled(tmp_path):
    table = records.GpuTable(tmp_path / "a.csv", "dry run", "kernels")
    table({"what": "kernel", "us": 1.5})
    table({"what": "kernel", "failed": records.reason(ValueError("one\ntwo"))})
    assert table.failures == 1
    base = {"run": "dry run", "stage": "kernels", "what": "kernel"}
    assert records.read(tmp_path / "a.csv") == [base | {"us": "1.5"}, base | {"failed": "ValueError: one"}]


class TestTheMachineBesideThem:
    def test_without_git(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        results.write_machine(tmp_path / "m.json", {"run": "gpu"})
        record = json.loads((tmp_path / "m.json").read_text())
        assert record["commit"] == "unknown" and record["run"] == "gpu"

    def test_a_commit_that_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv(results.COMMIT, "abc1234")
        results.write("a", [{"x": 1}], tmp_path)
        assert json.loads((tmp_path / "a.machine.json").read_text())["commit"] == "abc1234"

    @pytest.mark.skipif(not (BENCHMARKS.parent / ".git").exists(), reason="no git repository")
    def test_with_git(self, tmp_path):
        command = ["git", "-C", str(BENCHMARKS), "rev-parse", "--short", "HEAD"]
        expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert results.COMMIT not in os.environ and results.machine()["commit"] == expected
