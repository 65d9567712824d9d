"""A stage of run.py: sees to it that the back ends have their libraries. Those that were compiled beforehand are
checked, what is missing or does not fit is compiled here where there is a compiler. Prints a line per library; exit
code 1 if one is not there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from libraries import load_build


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("libraries", nargs="+", choices=("cpu", "cuda"))
    options = parser.parse_args()
    build, missing = load_build(options.package), []
    for name in options.libraries:
        if (obstacle := build.obstacle(name, options.package)) is None:
            print(f"{name}: compiled beforehand", flush=True)
            continue
        print(f"{name}: {obstacle}; compiling", flush=True)
        try:
            build.build(name, options.package)
            print(f"{name}: compiled here", flush=True)
        except RuntimeError as error:  # BuildError: with the compiler's message
            print(error, flush=True)
            lines = str(error).splitlines()  # of a compiler's message the first that says error
            missing.append(f"{name}: {next((line for line in lines[1:] if 'error' in line), lines[0])}")
    if missing:
        print(f"cannot be compiled here: {'; '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
