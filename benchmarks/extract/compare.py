"""Every method on the demo model's two behaviours: what `faststeer extract --behaviour ... --method all --json` prints,
kept with the machine it ran on.

    OMP_NUM_THREADS=1 python benchmarks/extract/compare.py [refusal] [tone]

Writes benchmarks/results/extract_refusal.json and extract_tone.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

from faststeer.files import write_atomically


def main() -> None:
    for behaviour in sys.argv[1:] or ("refusal", "tone"):
        command = ["extract", "--behaviour", behaviour, "--method", "all", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", "from faststeer.cli import app; app()", *command], stdout=subprocess.PIPE, check=True
        )
        report = {"command": " ".join(["faststeer", *command]), "machine": results.machine()} | json.loads(done.stdout)
        for row in report["results"]:
            del row["seconds"]  # what a method achieves is the question here; the machine may be shared
        path = results.FOLDER / f"extract_{behaviour}.json"
        write_atomically(path, json.dumps(report, indent=2) + "\n")
        print(path)


if __name__ == "__main__":
    main()
