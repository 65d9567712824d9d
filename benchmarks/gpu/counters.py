"""A stage of run.py: hardware counters of four kernels, read by Nsight Compute (ncu), with the clocks left alone.

Each kernel becomes a row: its time under the profiler, and in `op` registers, occupancy and the share of peak memory
bandwidth. Exit code 77: there is no ncu, or it may not read the counters here.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import records
from processes import tool

SKIPPED = 77
KERNELS = Path(__file__).parents[1] / "kernels" / "gpu.py"
# Name in the CSV that ncu writes -> what it is called here.
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of peak DRAM",
    "dram__bytes.sum": "bytes of DRAM",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps",
    "launch__registers_per_thread": "registers",
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "% of issue slots",
    "lts__t_sector_hit_rate.pct": "% L2 hits",
}
NO_COUNTERS = ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler", "not supported", "No kernels were profiled")


def rows_of(text: str) -> list[dict[str, str]]:
    """A row per kernel from ncu's `--csv --page raw`: names, units, then the kernels."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    kernels = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))[1:]  # without the row of units
    rows = []
    for kernel in kernels:
        values = {METRICS[name]: kernel[name] for name in METRICS if kernel.get(name)}
        text = "; ".join(f"{value} {name}" for name, value in values.items() if name != "ns")
        row = {"what": "counters", "op": f"{kernel.get('Kernel Name', '?')[:60]}: {text}"}
        if "ns" in values:
            row["us"] = str(round(float(values["ns"].replace(",", "")) / 1e3, 3))
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--stage", default="counters")
    options = parser.parse_args()
    program = [sys.executable, str(KERNELS), "profile", "--csv", str(options.csv), "--stage", options.stage]
    if not torch.cuda.is_available():
        return subprocess.run(program, check=False).returncode
    if (ncu := tool("ncu")) is None:
        print("ncu is not installed")
        return SKIPPED
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    command += ["--metrics", ",".join(METRICS), "--csv", "--page", "raw", "--print-units", "base"]
    done = subprocess.run(
        [*command, *program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(done.stdout, flush=True)
    rows = rows_of(done.stdout)
    table = records.GpuTable(options.csv, "gpu", options.stage)
    for row in rows:
        table(row)
    if rows and done.returncode == 0:
        return 0
    if fault := next((line for line in done.stdout.splitlines() if any(word in line for word in NO_COUNTERS)), None):
        print(f"ncu reads no counters here: {fault.strip('= ')}")
        return SKIPPED
    return 1


if __name__ == "__main__":
    sys.exit(main())
