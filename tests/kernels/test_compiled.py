"""What the kernels are compiled to, and how often. Needs no GPU: Triton compiles for one that is not there."""

import pytest
import torch

ROW_OPERATORS = ["steer", "add_steer", "steer_pair_", "add_steer_rmsnorm", "latch_"]
HALF = [torch.bfloat16, torch.float16]
MULTIPROCESSOR = 65536  # registers
BLOCKS = 32  # programs that a multiprocessor takes at most


def name(value):
    return str(value).removeprefix("torch.")


def full(*values):
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


@pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("operator", ROW_OPERATORS)
@pytest.mark.parametrize("hidden", [4096, *full(64, 896, 2048, 2560, 3584, 5120, 8192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *full(torch.float16)], ids=name)
def test_code_of_row_kernels(compiled, capability, operator, hidden, dtype):
    for code in compiled("machine_code", capability, hidden, dtype, operator):
        check_arithmetic(code)
        check_accesses(code, operator, hidden)
        check_local_memory(code, operator, hidden)
        assert code.layout_conversions == 0, "elements travel between threads, though all operands are shared out alike"
        programs = min(BLOCKS, MULTIPROCESSOR // (code.registers * 32 * code.num_warps))
        in_flight = programs * hidden * dtype.itemsize * (2 if operator.startswith(("add_", "steer_pair_")) else 1)
        assert in_flight >= min(32768, BLOCKS * hidden * dtype.itemsize) * 7 // 8, (
            f"{programs} programs with {code.registers} registers fit on a multiprocessor: {in_flight} bytes in flight"
        )


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda c: f"sm_{c}")
@pytest.mark.parametrize("operator", ROW_OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("hidden", [111, 4096, 5120, 16384])
def test_code_where_registers_are_scarce(compiled, capability, operator, hidden, dtype):
    """fp32, unaligned, and the widest rows: no thread puts away as much as its 32 elements of a row, which would mean
    that the row is not in registers."""
    for code in compiled("machine_code", capability, hidden, dtype, operator):
        check_arithmetic(code)
        assert code.stack < 32 * 4


def check_arithmetic(code):
    assert not code.fp_fusion, "the machine's compiler may fuse"
    assert code.fma == 0, "a product is not rounded before it is added"
    # Those of divisions and square roots: as many whatever the row's size, and few.
    assert code.sass_fma <= 48, f"{code.sass_fma} fused multiply-adds in the machine's code"


def check_accesses(code, operator, hidden):
    """Rows go by 16 bytes, or, where a thread of a single warp has less of them, a whole row goes at once; what is
    smaller are numbers of the tables."""
    is_short = hidden < 32 * 8
    vectors = "v2.b32" if is_short else "v4.b32"  # the bank's, at 64 columns 2 for each thread; x has 4 bytes there
    assert set(code.loads) <= {vectors, "b32", "b8"}, code.loads
    assert set(code.stores) <= {vectors, "b32", "b8"}, code.stores
    assert code.loads[vectors] >= (1 if is_short else 8)
    assert code.loads["b32"] <= 24, "some row is read by 4 bytes"
    if operator != "latch_":
        of_probes = 5 if operator == "steer_pair_" else 4  # which also writes the zeros
        of_rows = code.stores["b32"] - of_probes if is_short else code.stores[vectors]
        assert of_rows >= (2 if operator in ("steer_pair_", "add_steer_rmsnorm") else 1)
        assert is_short or code.stores["b32"] <= of_probes, "some row is written by 4 bytes"


def check_local_memory(code, operator, hidden):
    """Nothing up to 4,096 columns. Wider rows, of which two must share a multiprocessor, may put two addresses away
    before their entries act and take them back afterwards (seen: 8 or 16 bytes on sm_80 and sm_100): never in a loop,
    where every entry would pay for it; but for one access where a pair is written (sm_80)."""
    assert code.stack <= (0 if hidden <= 4096 else 16), (
        f"{code.stack} bytes per thread do not fit into {code.registers} registers"
    )
    assert code.local_in_loops <= (operator == "steer_pair_" and hidden > 4096)


def test_fused_multiply_adds_do_not_grow_with_the_row(compiled):
    counts = {
        hidden: [code.sass_fma for code in compiled("machine_code", 90, hidden, torch.bfloat16, "steer")]
        for hidden in (64, 4096)
    }
    assert counts[64] == counts[4096]


def test_every_compilation_happens_in_warmup(compiled):
    """Rows, strides, addresses, table sizes and numbers make no variant."""
    in_warmup, later = compiled("compilations", 64, torch.float16)
    assert later == 0
    aligned_and_not = 2 * (3 + 2 + 2)
    assert in_warmup == aligned_and_not
