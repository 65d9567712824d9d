"""A stage of run.py: what machine this is and how fast it copies. The last line is a JSON object for run.py."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import records
import results

from faststeer import measure

CUDA = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--stage", default="device")
    options = parser.parse_args()
    packages = {name: measure.version(name) for name in ("triton", "transformers", "pytest", "liger-kernel", "vllm")}
    results.write_machine(options.csv.with_suffix(".machine.json"), packages)
    table = records.GpuTable(options.csv, "gpu" if CUDA else "dry run", options.stage)
    for n_bytes in (2**30, 2**32) if CUDA else (2**16,):
        if CUDA and 4 * n_bytes > torch.cuda.mem_get_info()[0]:
            continue
        speed, timing = measure.copy_bandwidth("cuda" if CUDA else "cpu", n_bytes, replays=7 if CUDA else 1)
        row = {"what": "copy", "op": f"copy of {n_bytes} bytes", "who": "torch", "gb_per_s": round(speed / 1e9, 1)}
        table(row | asdict(timing))
        print(f"{row['op']}: {row['gb_per_s']} GB/s", flush=True)
    facts = {"torch": torch.__version__, "gpu": None, "arch": None}
    if CUDA:
        facts |= {"gpu": torch.cuda.get_device_name(), "arch": "{}{}".format(*torch.cuda.get_device_capability())}
    print("DEVICE " + json.dumps(facts))


if __name__ == "__main__":
    main()
