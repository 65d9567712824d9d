"""The comparison with other libraries: the protocol of a peer's process, what becomes of one that fails, the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import results
from peers import environments, job, run, table

FOLDER = Path(run.__file__).parent
PEER = """
import time
import sys
import numpy as np
sys.path.insert(0, {folder!r})
from job import Peer, Unsupported, main

class Small(Peer):
    versions = {{"small": "1.0"}}
    def __init__(self, job):
        self.job = job
        print("a library prints, too")
        {at_start}
    def vector(self):
        raise Unsupported("makes none")
    def generate(self, case, new_tokens):
        time.sleep(0.002)
        if case == "plan per row":
            raise Unsupported("one vector for all")
        if case == "one layer":
            raise RuntimeError("broken")
        return len(self.job["prompts"]) * new_tokens {less}
    def logits(self, case):
        if case == "plan per row":
            raise Unsupported("one vector for all")
        return np.full((2, 5), {logit})

main(Small)
"""


@pytest.fixture
def measure(tmp_path):
    """Run peers' scripts as the benchmark does, the first of them the baseline, and return the log's rows."""

    def measure(*peers, minutes=1.0, log=None):
        log = log or results.Log(tmp_path / "log.jsonl", {})
        work = {"prompts": [[1], [2]], "new_tokens": 3, "threads": 1, "layer": 1, "layers": [1, 2]}
        processes = {}
        for name, options in peers:
            script = tmp_path / f"{name}.py"
            values = {"at_start": "pass", "less": "", "logit": 0.0} | options
            script.write_text(PEER.format(folder=str(FOLDER), **values))
            if process := run.start(run.Entry(name, str(script)), work, log, tmp_path, minutes):
                processes[name] = process
        run.measure_all(processes, 2, log)
        for process in processes.values():
            process.end()
        return log

    return measure


def test_what_works_is_measured_and_what_does_not_says_why(measure):
    rows = measure(("small", {})).rows
    assert rows[0]["versions"] == {"small": "1.0"}
    generated = [(r["case"], r["repeat"], r["tokens"]) for r in rows if r["measure"] == "generate"]
    assert generated == [(case, repeat, 6) for repeat in range(2) for case in ("unsteered", "every layer")]
    notes = {(r["measure"], r["case"]): r.get("unsupported") or r.get("failed") for r in rows if "case" in r}
    assert notes["warm-up vector", ""] == "makes none"
    assert notes["warm-up", "plan per row"] == notes["logits", "plan per row"] == "one vector for all"
    assert notes["warm-up", "one layer"] == "RuntimeError: broken"


def test_peers_take_turns(measure):
    rows = [r for r in measure(("a", {}), ("b", {})).rows if r["measure"] == "generate"]
    turns = [(r["repeat"], r["case"], r["peer"]) for r in rows]
    cases = ("unsteered", "every layer")
    assert turns == [
        (n, case, peer) for n, order in enumerate((["a", "b"], ["b", "a"])) for case in cases for peer in order
    ]


def test_a_run_goes_on_where_it_was(measure, tmp_path):
    log = measure(("a", {}), ("b", {}))
    whole = [row for row in log.rows if row["measure"] == "generate"]
    log.forget(peer="b", case="every layer", repeat=1)
    again = results.Log(tmp_path / "log.jsonl", {})
    measure(("a", {}), ("b", {}), log=again)
    same = [row for row in again.rows if row["measure"] == "generate"]
    (new,) = [row for row in same if row not in whole]
    assert len(same) == len(whole) and (new["peer"], new["case"], new["repeat"]) == ("b", "every layer", 1)
    assert len([row for row in again.rows if row["measure"] == "load"]) == 2


@pytest.mark.parametrize(
    ("options", "minutes", "reason"),
    [
        ({"at_start": "raise OSError('no such library')"}, 1, "OSError: no such library"),
        ({"less": "- (new_tokens == 3)"}, 1, "5 tokens were generated, expected 6"),
        ({"at_start": "import time; time.sleep(30)"}, 0.02, "took longer than 0.02 minutes"),
        ({"less": "- (new_tokens == 3 and (time.sleep(30) or 0))"}, 0.05, "took longer than 0.05 minutes"),
        ({"at_start": "import os; os._exit(3)"}, 1, "exit code 3"),
    ],
)
def test_a_process_that_fails_is_a_row(options, minutes, reason, measure):
    log = measure(("small", options), ("other", {}), minutes=minutes)
    (failed,) = [row for row in log.rows if row["measure"] == "end"]
    assert failed["peer"] == "small" and reason in failed["failed"]
    assert log.has(peer="other", measure="generate", case="every layer", repeat=1)


def test_the_table_shows_values_refusals_and_failures(measure, tmp_path):
    peers = (
        (table.BASELINE, {"logit": 1.0}),
        ("other", {"logit": 1.5}),
        ("broken", {"at_start": "raise OSError('gone')"}),
    )
    rows = results.read(results.write("peers", table.rows_of(measure(*peers).rows), tmp_path))
    lines = table.markdown(rows).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:5]}
    assert cells["other"][0] == "no" and cells["other"][2] == "failed" and cells["other"][4] == "no"
    assert " to " in cells["other"][1] and "tokens/s" in cells[table.BASELINE][1]
    assert cells["other"][5] == "5e-01" and cells[table.BASELINE][5] == "0e+00"
    assert cells["broken"] == ["failed"] * 5 + ["-"]
    assert lines[-1] == "broken: failed: OSError: gone"
    table.draw(rows, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_of_the_same_repeat():
    """A time in which the machine was half as fast changes no ratio."""
    about = {"measure": "generate", "case": "every layer", "tokens": 10}
    lines = [
        {**about, "peer": peer, "repeat": repeat, "seconds": seconds * 2**repeat}
        for repeat in range(3)
        for peer, seconds in ((table.BASELINE, 1.0), ("other", 0.5))
    ]
    assert table.ratios(table.rows_of(lines), "other", "every layer") == [2.0, 2.0, 2.0]


def test_the_plans_of_rows_and_their_coefficients_say_the_same():
    work = {"prompts": [[0]] * 9, "layer": 3, "layers": [1, 2, 3, 4]}
    add, ablate = job.row_coefficients(work)
    assert add.shape == ablate.shape == (5, 9) and not add[0].any() and not ablate[0].any()
    for row, (what, layers, strength) in enumerate(job.row_plans(work)):
        table_of = {"add": add, "ablate": ablate}
        expected = np.isin(np.arange(5), layers) * np.float32(strength)
        np.testing.assert_array_equal(table_of.pop(what)[:, row], expected.astype(np.float32))
        assert not next(iter(table_of.values()))[:, row].any()
    assert len({json.dumps(plan) for plan in job.row_plans(work)}) > 4


def test_every_peer_has_a_script_and_pins():
    for entry in run.PEERS:
        assert (FOLDER / entry.script).is_file()
        if entry.environment:
            *_, line = (environments.REQUIREMENTS / f"{entry.environment}.txt").read_text().split()
            assert "==" in line and not line.startswith("torch")
    assert all("==" in pin for pin in environments.shared_pins() if pin.startswith(("torch", "transformers")))


@pytest.mark.parametrize("fails", [True, False])
def test_an_environment_that_cannot_be_made_says_why(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    log = tmp_path / "x.log"
    if fails:
        command = [sys.executable, "-c", "print('ERROR: no matching version'); raise SystemExit(1)"]
        with pytest.raises(environments.NotInstalled, match="no matching version"):
            environments._run(command, log, 20)
    else:
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        with pytest.raises(environments.NotInstalled, match="longer"):
            environments._run(command, log, 0.3)


def test_a_process_with_no_peer_to_import_leaves_the_rest(tmp_path):
    """The script of a peer that is not installed here fails with words, not in silence."""
    path = tmp_path / "job.json"
    path.write_text("{}")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "with_repeng.py"), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode and "repeng" in done.stderr.splitlines()[-1]


def test_f32_gguf_has_the_same_tensors(tmp_path):
    gguf = pytest.importorskip("gguf")
    draw = np.random.default_rng(0)
    source, weights = tmp_path / "q.gguf", draw.standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b\u00fc"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3])
    writer.add_add_bos_token(False)
    kind = gguf.GGMLQuantizationType.Q4_1
    packed = gguf.quants.quantize(weights, kind)
    writer.add_tensor("w", packed, raw_dtype=kind)
    writer.add_tensor("norm", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    run.write_f32(source, tmp_path / "f.gguf")
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "f.gguf")
    tensors = {tensor.name: tensor for tensor in new.tensors}
    assert {tensor.tensor_type for tensor in tensors.values()} == {gguf.GGMLQuantizationType.F32}
    np.testing.assert_array_equal(tensors["w"].data.reshape(6, 64), gguf.quants.dequantize(packed, kind))
    np.testing.assert_array_equal(tensors["norm"].data, weights[0])
    for name, field in old.fields.items():
        if not name.startswith("GGUF.") and name != "general.file_type":
            assert new.fields[name].contents() == field.contents(), name
