"""A small run of every op on every back end that is a kernel: for compute-sanitizer, which sees reads and writes
outside what was allocated, and races in shared memory. Results are compared on the CPU, so that the checker has little
else to watch.

    compute-sanitizer --tool memcheck python tests/gpu/sanitized.py
    python tests/gpu/sanitized.py --backend triton --few

A back end that does not work here fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("", "ops", "cuda")]

import torch
from device import BACKENDS, CUDA, DEVICE
from operators import Called
from random_tables import COLUMNS, Case, bits, check_close

from faststeer import ops
from faststeer.ops import reference
from faststeer.ops.tables import EntryKind, Field

NORM = 1e-6, 0.0, False
# Every launch configuration: one warp per row, several, rows of a block; by 16 bytes, and by elements.
SHAPES = ((64, 140), (111, 5), (1000, 140), (4096, 3), (5120, 140)) if CUDA else ((64, 5), (111, 3))
HOSTILE = torch.tensor([-(2**31), -7, -1, 0, 1, 2, 6, 9, 1000, 2**31 - 1])


def run(backend: ops.Backend, hidden: int, rows: int, dtype: torch.dtype) -> None:
    counts = (1, 2, 3, 17) if CUDA else (1, 2)
    here, there = (Case(hidden, dtype, rows, hidden, device=d, counts=counts) for d in ("cpu", DEVICE))
    op, arguments = Called(there, backend), (here.tables, here.rows, here.gate_state)
    for s, found in (
        (here.x, op.steer(there.x, COLUMNS)[0]),
        (here.x + here.residual, op.add_steer(there.x, there.residual, COLUMNS)[0]),
        (here.x + here.residual, op.add_steer_rmsnorm(there.x, there.residual, there.weight, NORM, COLUMNS)[1]),
    ):
        exact, plain = (reference.steer(t, *arguments) for t in (s.double(), s))
        check_close(found.cpu(), exact, plain, s.double().norm(dim=1), f"{backend} {hidden} {rows} {dtype}")
    pair, added = (there.copy(), there.copy(there.residual)), op.add_steer(there.x, there.residual, COLUMNS)[0]
    same = here.x.clone(), here.residual.clone()
    op.steer_pair_(*pair, torch.zeros(rows, COLUMNS).to(DEVICE))
    reference.steer_pair_(*same, *arguments)
    acted = ~same[0].any(1, keepdim=True)
    for ours, steered, before in zip(pair, (torch.zeros_like(added), added), (here.x, here.residual), strict=True):
        assert torch.equal(bits(ours.cpu()), torch.where(acted, bits(steered.cpu()), bits(before)))
    entries = here.tables.entries.clone()
    entries[::2, Field.KIND] = int(EntryKind.LATCH)
    tables = there.tables._replace(entries=entries.to(DEVICE))
    ops.latch_(there.x, tables, there.rows, there.gate_state, residual=there.residual, backend=backend)


def run_hostile(backend: ops.Backend, seed: int) -> None:
    """Tables that point anywhere: nothing comes out right, and nothing may be touched outside."""
    generator = torch.Generator().manual_seed(seed)
    case = Case(64 + seed % 2 * 6, torch.float32, 40 if CUDA else 6, seed, device=DEVICE, counts=(1, 2, 3))

    def spoiled(table: torch.Tensor) -> torch.Tensor:
        table = table.cpu().clone()
        pick = torch.rand(table.shape, generator=generator) < 0.15
        table[pick] = HOSTILE[torch.randint(len(HOSTILE), (int(pick.sum()),), generator=generator)].int()
        return table.to(DEVICE)

    case.tables = case.tables._replace(entries=spoiled(case.tables.entries), ranges=spoiled(case.tables.ranges))
    case.rows = torch.stack((spoiled(case.rows[0]), case.rows[1], spoiled(case.rows[2])))
    op = Called(case, backend)
    op.steer(case.x, COLUMNS)
    op.add_steer_rmsnorm(case.x, case.residual, case.weight, NORM, COLUMNS)
    op.steer_pair_(case.x, case.residual, torch.zeros(len(case.x), COLUMNS, device=DEVICE))
    ops.latch_(case.x, case.tables, case.rows, case.gate_state, backend=backend)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS[:2], nargs="+", default=BACKENDS[:2])
    parser.add_argument("--few", action="store_true", help="what Triton compiles in seconds: bf16, on a GPU one shape")
    options = parser.parse_args()
    shapes = ((4096, 3),) if options.few and CUDA else SHAPES
    dtypes = (torch.bfloat16,) if options.few else (torch.bfloat16, torch.float32)
    failures = 0
    for backend in options.backend:
        if not (state := ops.states()[backend]).works:
            print(f"{backend} does not work here: {state.reason}", flush=True)
            failures += 1
            continue
        for hidden, rows in shapes:
            for dtype in dtypes:
                run(backend, hidden, rows, dtype)
                print(f"{backend}: {rows} rows of {hidden}, {dtype}", flush=True)
        for seed in range(6 if CUDA and not options.few else 1):
            run_hostile(backend, seed)
        if CUDA:
            torch.cuda.synchronize()
        print(f"{backend}: the small case ran", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
