"""Makes a checkout importable as the installed package would be, without installing anything: a plain copy of the tree
has neither `faststeer.kernels` nor a place for libraries that were compiled elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "libraries.json"  # in a folder of libraries that were compiled beforehand


class Unfit(ValueError):
    """Libraries compiled beforehand that are not for this machine, PyTorch or these sources."""


def install(site: Path) -> Path:
    """A copy of the package in `site`, with kernels/triton as `faststeer.kernels` and the C++ sources in it; returns
    the package's folder. Copied, not linked, so that what is built or put there leaves the checkout alone."""
    package = site / "faststeer"
    unneeded = shutil.ignore_patterns("__pycache__", "build")  # lib/build has object files
    for source, target in (("faststeer", package), ("kernels/triton", package / "kernels"), ("csrc", package / "csrc")):
        shutil.copytree(ROOT / source, target, ignore=unneeded)
    return package


def put_libraries(package: Path, prebuilt: Path, arch: str | None, torch: str) -> None:
    """Copy libraries that were compiled beforehand into the package.

    Args:
        prebuilt: folder that benchmarks/gpu/libraries.py filled.
        arch: compute capability of the GPU without the dot; None: no GPU, only the CPU's library is taken.
        torch: version that is to load them.

    Raises:
        Unfit: the folder holds none, or what it holds fits not this GPU or PyTorch; the CPU's library may be there.
    """
    try:
        manifest = json.loads((prebuilt / MANIFEST).read_text())
        archs, target = list(map(str, manifest["archs"])), tuple(manifest["torch_target"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Unfit(f"{prebuilt} has no libraries: make gpu-libraries fills a folder with them") from None
    version = tuple(map(int, re.findall(r"\d+", torch)[:2]))
    if version < target:
        wanted = ".".join(map(str, target))
        raise Unfit(f"the libraries need PyTorch {wanted} or later, here is {torch}")
    (package / "lib").mkdir(exist_ok=True)
    names = ["cpu", "cuda"] if arch is not None and fits(archs, arch) else ["cpu"]
    for name in names:
        for file in (f"faststeer_{name}.so", f"{name}.json"):
            if (prebuilt / "lib" / file).exists():
                shutil.copy2(prebuilt / "lib" / file, package / "lib" / file)
    if arch is not None and "cuda" not in names:
        raise Unfit(f"the CUDA library was compiled for {_names(archs)}, this GPU is sm_{arch}")


def fits(archs: Sequence[str], arch: str) -> bool:
    """Whether code for one of these compute capabilities runs on that GPU: the same major and no later minor, or, as
    the last is there as PTX too, anything later than that. 90a runs on 90 alone."""
    major, minor = int(arch[:-1]), int(arch[-1])
    for one in archs:
        plain = one.rstrip("af")
        if int(plain[:-1]) == major and (int(plain[-1]) <= minor if one == plain else plain == arch):
            return True
    last = archs[-1]
    return last.isdigit() and int(arch) >= int(last)


def unpack_wheels(prebuilt: Path, site: Path) -> list[str]:
    """The wheels in the folder, each a package of Python alone, unpacked; returns their names."""
    wheels = sorted(prebuilt.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)
    return [wheel.name for wheel in wheels]


def python_path(*folders: Path) -> str:
    """PYTHONPATH with these folders first."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, folders), *([inherited] if inherited else [])])


def _names(archs: Sequence[str]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)
