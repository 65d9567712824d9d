"""The paper's study: what `faststeer observe` finds on the demo model and on SmolLM2, kept with the machine it ran on.

    OMP_NUM_THREADS=1 python benchmarks/observe/study.py [name] [folder for the parts]

Writes benchmarks/results/observe/<name>.json and, of its figures, those that docs/observe.md shows. Named the same
folder, it goes on where it stopped. Names:

- `refusal`: the demo model's.
- `refusal-half`, `refusal-half-induce`: one vector of the demo model at the strength at which about half of the answers
  tip, when it is subtracted from harmful requests or added to harmless ones.
- `tone`: SmolLM2's. Layer and token are given, those that the demonstration steers.
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
SHARES = "0.002,0.01,0.02,0.05,0.1,0.15,0.2,0.3,0.5,1"  # 0.002 of 541 edges: one
HALF = "--method dim --layer 1 --position -1 --prompts 48 --patched 16 --tried 4 --controls 1"
ASKED = {
    "refusal": f"--prompts 48 --patched 16 --tried 8 --controls 5 --shares {SHARES}",
    "refusal-half": f"{HALF} --coefficient 0.65 --shares 0.01,0.1 --sparsities 0.5",
    "refusal-half-induce": f"{HALF} --coefficient 0.4 --shares 0.01,0.1 --sparsities 0.5",
    "tone": "--model smollm2 --behaviour tone --layer 18 --position -1 --prompts 24 --patched 8 --tried 4 --points 5 "
    "--steps 30 --max-new-tokens 32 --controls 2 --shares 0.001,0.01,0.05,0.1,0.2,0.5,1 --sparsities 0.5,0.8,0.9,0.95",
}
FIGURES = {
    "refusal": ("faithfulness-own", "overlap", "sparsity-dim-induce"),
    "tone": ("faithfulness-own", "sparsity-dim-suppress"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "refusal"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[2] if len(sys.argv) > 2 else temporary)
        command = ["observe", *ASKED[name].split()]
        places = ["--out", str(folder), "--png", str(folder / "figures"), "--batch-size", "64"]
        program = [sys.executable, "-c", "from faststeer.cli import app; app()", *command, *places]
        if subprocess.run(program).returncode not in (0, 3):  # 3: something is left out, and named in the result
            sys.exit(1)
        found = json.loads((folder / "observe.json").read_text(encoding="utf-8"))
        report = {"command": " ".join(["faststeer", *command]), "machine": results.machine()} | found
        path = FOLDER / f"{name}.json"
        write_atomically(path, json.dumps(report, indent=1) + "\n")
        for figure in FIGURES.get(name, ()):
            write_atomically(FOLDER / f"{name}-{figure}.png", (folder / "figures" / f"{figure}.png").read_bytes())
    print(path)


if __name__ == "__main__":
    main()
