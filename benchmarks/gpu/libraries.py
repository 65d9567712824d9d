"""Compiles the CPU's and the CUDA library beforehand, into a folder that can be carried to a machine with a GPU:

    python benchmarks/gpu/libraries.py out/gpu-libraries

It needs nvcc and a C++ compiler, but no GPU. FASTSTEER_CUDA_ARCHS names the GPUs ("90;100"); default: all that nvcc
knows. One build serves every later PyTorch and every Python. A wheel that lies in the folder, such as liger-kernel's,
is unpacked there and measured, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkout


def compile_into(folder: Path) -> list[str]:
    """Returns the compute capabilities that the CUDA library is for.

    Raises:
        BuildError: something cannot be compiled here.
    """
    build = load_build(checkout.ROOT / "faststeer")
    archs = build.cuda_archs(build.find_nvcc())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / checkout.MANIFEST).unlink(missing_ok=True)  # should this be stopped half-way
    for name in ("cpu", "cuda"):
        work = folder.parent / f"{folder.name}.objects"  # not to be carried
        print(f"{name}: {'compiled' if build.build(name, folder, work) else 'up to date'}", flush=True)
    manifest = {"archs": archs, "torch_target": build.TORCH_TARGET, "torch": build.torch_version(build.torch_folder())}
    (folder / checkout.MANIFEST).write_text(json.dumps(manifest) + "\n")
    return archs


def load_build(package: Path):  # type: ignore[no-untyped-def]
    """faststeer/build.py of that package, by itself: it needs nothing but the standard library."""
    spec = importlib.util.spec_from_file_location("faststeer_build", package / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faststeer_build"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    try:
        archs = compile_into(folder)
    except RuntimeError as error:  # BuildError
        print(error, file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB, for {', '.join(f'sm_{arch}' for arch in archs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
