"""The paper's study on the demo model: what `faststeer observe` finds, kept with the machine it ran on.

    OMP_NUM_THREADS=1 python benchmarks/observe/study.py [folder for the parts]

Writes benchmarks/results/observe/refusal.json and, of its figures, those that docs/observe.md shows. Named the same
folder, it goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import results

from faststeer.files import write_atomically

FOLDER = results.FOLDER / "observe"
ASKED = ["--prompts", "48", "--patched", "16", "--tried", "8", "--controls", "5"]
FIGURES = ("faithfulness-own", "overlap", "sparsity-dim-induce")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        command = ["observe", *ASKED]
        places = ["--out", str(folder), "--png", str(folder / "figures"), "--batch-size", "64"]
        program = [sys.executable, "-c", "from faststeer.cli import app; app()", *command, *places]
        subprocess.run(program, check=True)
        found = json.loads((folder / "observe.json").read_text(encoding="utf-8"))
        report = {"command": " ".join(["faststeer", *command]), "machine": results.machine()} | found
        write_atomically(FOLDER / "refusal.json", json.dumps(report, indent=1) + "\n")
        for name in FIGURES:
            write_atomically(FOLDER / f"{name}.png", (folder / "figures" / f"{name}.png").read_bytes())
    print(FOLDER)


if __name__ == "__main__":
    main()
