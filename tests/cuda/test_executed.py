"""What a row costs on a GPU, counted without one: the machine code of `add_steer_rmsnorm` for bf16 rows of 4,096
columns on sm_90 and sm_100, executed instruction by instruction (benchmarks/kernels/sass.py). The budgets are those of
docs/kernels.md, 'Instructions per row'."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faststeer import build

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "kernels"))
import executed
import paper
import sass


def _nvcc():
    try:
        return build.find_nvcc()
    except build.BuildError:
        return None


CUDA = pytest.param(
    executed.compile_cuda, executed.execute_cuda, {"none": 390, "add": 600, "mixed4": 1610}, id="cuda",
    marks=pytest.mark.skipif(_nvcc() is None, reason="no nvcc"),
)  # fmt: skip
TRITON = pytest.param(
    executed.compile_triton, executed.execute_triton, {"none": 330, "add": 560, "mixed4": 1520}, id="triton",
    marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"),
)  # fmt: skip
HOPS = 3


@pytest.mark.parametrize("steering", executed.STEERINGS)
@pytest.mark.parametrize("arch", sass.BANKS, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize(("compile_it", "execute", "budgets"), [CUDA, TRITON])
def test_a_row_costs_no_more_than_its_budget(compile_it, execute, budgets, arch, steering):
    code = compile_it(arch)
    row = execute(steering, code)
    assert code.stack == 0, "something is spilled"
    assert row.trace.issued <= budgets.get(steering, row.trace.issued)
    assert row.hops <= HOPS, "loads that the first vector waits for, one after another"
    assert (row.hops == 0) == (steering == "none")
    assert max(row.row_loads) < row.first_wait, "the loads of x and residual wait for a table"
    moved = {name: row.trace.of(name) for name in ("x", "residual", "weight", "bank")}
    assert len(moved["x"]) == len(moved["residual"]) == len(moved["weight"]) == 4
    stores = [s for s in row.trace.stores if s.buffer in ("hidden", "normed")]
    assert len(stores) == 8
    assert {access.size for accesses in (stores, *moved.values()) for access in accesses} <= {16}


@pytest.mark.parametrize("steering", executed.STEERINGS)
@pytest.mark.parametrize("arch", sass.BANKS, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize(("compile_it", "execute", "budgets"), [CUDA, TRITON])
def test_a_row_comes_out_as_the_reference_has_it(compile_it, execute, budgets, arch, steering):
    """Sums are added in another order, which may round the hidden state, and so the normed one, to a neighbour."""
    row = execute(steering, compile_it(arch))
    if steering in ("none", "add"):  # no sum comes before them
        assert torch.equal(row.hidden, row.expected[0])
    for ours, theirs in zip((row.hidden, row.normed), row.expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=2**-7)


def test_the_table_of_the_page_is_of_this_code():
    """With the versions that it was made with, which decide how much a warp issues."""
    if _nvcc() is None or "release 13.0" not in subprocess.check_output([_nvcc(), "--version"], text=True):
        pytest.skip("the table is of nvcc 13.0")
    if importlib.util.find_spec("triton") is None or importlib.metadata.version("triton") != "3.6.0":
        pytest.skip("the table is of Triton 3.6.0")
    page = paper.PAGE.read_text()
    table = page[page.index(paper.BEGIN) + len(paper.BEGIN) : page.index(paper.END)].strip()
    assert table == paper.table(paper.estimates(), paper.measured_in(page))


def test_what_a_gpu_has_measured_fills_its_column(tmp_path):
    """Not by a sweep's launches, nor by what is warm or was measured without a GPU."""
    results = tmp_path / "first.csv"
    results.write_text(
        "run,op,who,rows,hidden,plans,x,launch,steering,us,percent_of_copy\n"
        "gpu,add_steer_rmsnorm,cuda,16384,4096,1,cold,,mixed4,131.4,95.2\n"
        "gpu,add_steer_rmsnorm,cuda,16384,4096,1,cold,8 columns per thread,mixed4,1,1\n"
        "gpu,add_steer_rmsnorm,triton,16384,4096,1,warm,,mixed4,1,1\n"
        "dry run,add_steer_rmsnorm,triton,16384,4096,1,cold,,mixed4,1,1\n"
    )
    record = tmp_path / "first.machine.json"
    record.write_text('{"gpu": "NVIDIA H200"}')
    measured = paper.measured_by(results)
    assert measured == {("H200", "cuda", "four mixed"): "131 us, 95 %"}
    lines = [paper.Estimate("H200", "cuda", "mixed4", 1581, 3, 4, 2.9, 125e-6, 98.6e-6)]
    assert lines[0].of_copy == 1 and paper.Estimate("H200", "cuda", "add", 1, 3, 4, 0.5, 125e-6, 1e-6).of_copy == 0.5
    page = f"{paper.BEGIN}\n{paper.table(lines, measured)}\n{paper.END}"
    assert paper.measured_in(page) == measured
    empty = f"{paper.BEGIN}\n{paper.table(lines, {})}\n{paper.END}"
    assert paper.filled(empty, measured) == page and paper.filled(page, {}) == page
    for gpu in ('"NVIDIA A100-SXM4-80GB"', "null"):
        record.write_text(f'{{"gpu": {gpu}}}')
        with pytest.raises(ValueError, match=r"first\.csv is of (NVIDIA A100|no GPU).*: the table .* H100, H200, B200"):
            paper.measured_by(results)
    record.write_text('{"gpu": "NVIDIA H200"}')
    results.write_text("run,op\ngpu,copy\n")
    with pytest.raises(ValueError, match="has no line of run gpu, op add_steer_rmsnorm, rows 16384"):
        paper.measured_by(results)


def test_the_first_vector_waits_for_what_it_must():
    """Slot, range and entry: the measure of hops is not blind to them."""
    code = executed.compile_triton()
    row = executed.execute_triton("add", code)
    depths = {name: row.trace.of(name)[0].depth for name in ("rows", "ranges", "entries", "bank")}
    assert depths == {"rows": 1, "ranges": 2, "entries": 3, "bank": 4}


def test_an_instruction_that_is_not_known_is_an_error():
    code = "        /*0000*/                   FROB R1, R2 ;\n        /*0010*/                   EXIT ;\n"
    with pytest.raises(AssertionError, match=r"not known: .*FROB"):
        sass.Block(code, {}, b"", 32).run()


def test_addresses_outside_a_buffer_are_an_error():
    buffers = {"x": torch.zeros(4).numpy()}
    code = (
        "        /*0000*/                   LDC.64 R2, c[0x0][0x210] ;\n"
        "        /*0010*/                   LDG.E R4, desc[UR4][R2.64+{}] ;\n"
        "        /*0020*/                   EXIT ;\n"
    )
    parameters = sass.address(buffers, "x").to_bytes(8, "little")
    assert sass.Block(code.format("0xc"), buffers, parameters, 32).run().of("x")[0].size == 4
    with pytest.raises(AssertionError, match="beyond the end of x"):
        sass.Block(code.format("0x10"), buffers, parameters, 32).run()
