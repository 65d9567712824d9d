"""All benchmarks on SmolLM2 that need no other environment, one after the other: generation, reading, selection, sweep,
freezing.

    make bench-smollm2     or  python benchmarks/all.py [--quick]

About 42 minutes on two idle cores (14, 3, 4, 15, 4, 3), alone on the machine; `--quick` tries the same path in a few
minutes. What was stopped goes on where it was, as each benchmark does. Afterwards the tables in README and docs are
those of the new results (benchmarks/tables.py).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "generation/cpu.py", "extract/reading.py", "extract/selection.py", "extract/sharing.py", "evaluate/sweep.py",
    "observe/freezing.py",
)  # fmt: skip


def main() -> None:
    failed = []
    for script in SCRIPTS:
        print(f"== benchmarks/{script}", flush=True)
        if subprocess.run([sys.executable, str(HERE / script), *sys.argv[1:]]).returncode:
            failed.append(script)  # one that fails does not take the others with it
    if "--quick" not in sys.argv:
        subprocess.run([sys.executable, str(HERE / "tables.py"), "--write"], check=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
