"""What the kernels can reach on paper: `add_steer_rmsnorm` of 16,384 bf16 rows of 4,096 columns on H100, H200 and B200,
from the compiled code and the chips' numbers. Needs nvcc, Triton and no GPU.

    python benchmarks/kernels/paper.py           prints the table of docs/kernels.md
    python benchmarks/kernels/paper.py --write   writes it there; what stands in the column 'measured' stays
    python benchmarks/kernels/paper.py --measured out/gpu-first/first.csv   fills that column alone, from what
                                                 `make gpu-first` has measured: it needs neither nvcc nor Triton

Two bounds, of which the slower holds:
- memory: x, residual, hidden and normed, each moved once, at the speed of a device copy;
- issue: instructions per warp, executed (executed.py), at one per scheduler and cycle.
A row in flight is x and residual of one block; the rows that fit on a multiprocessor must cover its share of
bandwidth x latency, or memory is slower than a copy.

Left out: launches, tails, waits at barriers, contention in L2 for the vectors of many plans. So a measurement may be
slower than this, and cannot be faster.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import executed

from faststeer import measure

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import records  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- paper.py: from here -->", "<!-- paper.py: to here -->"
ROWS, HIDDEN, ITEMSIZE = 16_384, executed.HIDDEN, 2
WARP, SCHEDULERS, REGISTERS, MOST_BLOCKS = 32, 4, 65_536, 32
# Of what a datasheet promises, a device copy by PyTorch reaches this much (H200: 4.3 of 4.8 TB/s, bytes read and
# written, in public reports).
COPY = 4.3 / 4.8
LATENCY = 700e-9  # of a load that misses every cache, in seconds
NAMES = {"none": "unsteered", "add": "one `Add`", "ablate": "one `Ablate`", "mixed4": "four mixed"}


@dataclass(frozen=True)
class Chip:
    """A GPU: compute capability of the code that is counted, multiprocessors, boost clock in Hz, memory in bytes per
    second. By datasheet."""

    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float


CHIPS = {
    "H100": Chip("90", 132, 1.98e9, 3.35e12),
    "H200": Chip("90", 132, 1.98e9, 4.8e12),
    "B200": Chip("100", 148, 1.965e9, 8.0e12),
}


@dataclass(frozen=True)
class Estimate:
    """One line of the table; times in seconds."""

    chip: str
    backend: str
    steering: str
    instructions: int
    hops: int
    blocks: int  # rows in flight per multiprocessor
    in_flight: float  # of the bytes that must be under way for the full bandwidth
    memory: float
    issue: float

    @property
    def time(self) -> float:
        return max(self.memory / min(1.0, self.in_flight), self.issue)

    @property
    def of_copy(self) -> float:
        return self.memory / self.time


def estimate(
    name: str, backend: str, steering: str, code: executed.Code, instructions: int, hops: int, threads: int
) -> Estimate:
    """The bounds of one kernel on one chip."""
    chip = CHIPS[name]
    per_block = -(-code.registers // 8) * 8 * threads  # registers are allotted by 8 per thread
    blocks = min(MOST_BLOCKS, REGISTERS // per_block)
    row_bytes = HIDDEN * ITEMSIZE
    copy = chip.bandwidth * COPY
    needed = copy * LATENCY / chip.multiprocessors
    warps = ROWS * threads / WARP
    return Estimate(
        name, backend, steering, instructions, hops, blocks, blocks * 2 * row_bytes / needed,
        memory=measure.TENSORS_MOVED["add_steer_rmsnorm"] * ROWS * row_bytes / copy,
        issue=instructions * warps / (chip.multiprocessors * SCHEDULERS * chip.clock),
    )  # fmt: skip


def estimates() -> list[Estimate]:
    """All lines: every chip, back end and steering."""
    lines = []
    for backend, compiled, execute in (
        ("cuda", executed.compile_cuda, executed.execute_cuda),
        ("triton", executed.compile_triton, executed.execute_triton),
    ):
        codes = {chip.arch: compiled(chip.arch) for chip in CHIPS.values()}
        for steering in executed.STEERINGS:
            rows = {arch: execute(steering, code) for arch, code in codes.items()}
            for name, chip in CHIPS.items():
                row, code = rows[chip.arch], codes[chip.arch]
                lines.append(estimate(name, backend, steering, code, row.trace.issued, row.hops, code.threads))
    return lines


def table(lines: list[Estimate], measured: Mapping[tuple[str, str, str], str]) -> str:
    """Markdown. `measured`: of chip, back end and steering."""
    text = [
        "| | back end | steering | instructions per warp | loads before the vector | rows per SM "
        "| in flight, of needed | memory, us | issue, us | of copy, on paper | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for of in lines:
        name = NAMES[of.steering]
        text.append(
            f"| {of.chip} | {of.backend} | {name} | {of.instructions} | {of.hops or '-'} | {of.blocks} "
            f"| {of.in_flight:.1f} | {of.memory * 1e6:.0f} | {of.issue * 1e6:.0f} | {100 * of.of_copy:.0f} % "
            f"| {measured.get((of.chip, of.backend, name), '')} |"
        )
    return "\n".join(text)


def chip_of(results: Path) -> str:
    """The chip that `make gpu-first` has measured, from the machine's record beside its CSV.

    Raises:
        ValueError: no GPU, or one that the table does not have.
    """
    gpu = json.loads(results.with_suffix(".machine.json").read_text()).get("gpu") or "no GPU"
    for chip in CHIPS:
        if chip in gpu.split():
            return chip
    raise ValueError(f"{results} is of {gpu}: the table of {PAGE.name} has {', '.join(CHIPS)}")


def measured_by(results: Path) -> dict[tuple[str, str, str], str]:
    """Median times and shares of a copy from the CSV of `make gpu-first`: one plan, nothing in the caches, launched by
    rule.

    Raises:
        ValueError: nothing of that was measured, or not on a GPU of the table.
    """
    wanted = {"run": "gpu", "op": "add_steer_rmsnorm", "rows": str(ROWS), "hidden": str(HIDDEN)}
    wanted |= {"plans": "1", "x": "cold"}
    chip, lines = chip_of(results), [r for r in records.read(results) if wanted.items() <= r.items()]
    lines = [r for r in lines if "us" in r and "launch" not in r and r["steering"] in NAMES]
    if not lines:
        raise ValueError(f"{results} has no line of {', '.join(f'{name} {value}' for name, value in wanted.items())}")
    return {
        (chip, r["who"], NAMES[r["steering"]]): f"{float(r['us']):.0f} us, {float(r['percent_of_copy']):.0f} %"
        for r in lines
    }


def measured_in(page: str) -> dict[tuple[str, str, str], str]:
    """What stands in the column 'measured'."""
    found = {}
    for line in page[page.index(BEGIN) : page.index(END)].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and cells[0] in CHIPS:
            found[cells[0], cells[1], cells[2]] = cells[10]
    return found


def filled(page: str, measured: Mapping[tuple[str, str, str], str]) -> str:
    """The page, with what was measured in its column; what else stands there stays."""

    def fill(line: re.Match[str]) -> str:
        cells = [cell.strip() for cell in line[0].strip("|").split("|")]
        return f"| {' | '.join(cells[:-1])} | {measured.get((cells[0], cells[1], cells[2]), cells[-1])} |"

    return re.sub(rf"^\| (?:{'|'.join(CHIPS)}) \|.*$", fill, page, flags=re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    parser.add_argument("--measured", type=Path, help="fill the last column from this CSV of `make gpu-first`")
    options = parser.parse_args()
    page = PAGE.read_text()
    if options.measured:
        PAGE.write_text(filled(page, measured_by(options.measured)))
        return
    text = table(estimates(), measured_in(page))
    if options.write:
        PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page, flags=re.DOTALL))
    print(text)


if __name__ == "__main__":
    main()
