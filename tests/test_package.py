"""The wheel that users install: built from the source distribution, used where only what it requires is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = ("faststeer", "kernels", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
NO_SOURCES = shutil.ignore_patterns("__pycache__", "*.so", "lib", "*.egg-info")
STEERED = """
import faststeer as fs
assert fs.__file__.startswith({site!r}), fs.__file__
model, tokenizer = fs.demo.load()
refusal = fs.demo.behaviour("refusal")
vector = fs.extract.dim(model, tokenizer, refusal.train.positive[:16], refusal.train.negative[:16])
batch = fs.hf.tokenize(tokenizer, refusal.test.negative[:2])
with fs.steer(model, [fs.Plan([fs.Add(vector, 1.0, layers=2)]), None]):
    answers = model.generate(**batch, max_new_tokens=12)
steered, unsteered = tokenizer.batch_decode(answers[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
print(fs.evaluate.is_refusal(steered), fs.evaluate.is_refusal(unsteered))
"""


def call(*command: str | Path, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTSTEER", "COV"))}
    environment |= {"FASTSTEER_BUILD": "none", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """Source distribution and the wheel that was built from it alone, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("package")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=NO_SOURCES)
        else:
            shutil.copy(source, checkout / name)
    call(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, folder=checkout)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    call(sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", folder, folder=unpacked)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def files(folder: str) -> set[str]:
    """The files of a folder of the checkout that belong into what is installed, by their paths in it."""
    unwanted = {"__pycache__", "lib"}
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in {".so", ".pyc"})
    inside = (path.relative_to(ROOT / folder) for path in paths)
    return {path.as_posix() for path in inside if not unwanted & set(path.parts)}


def test_the_wheel_holds_the_package_and_nothing_else(archives):
    names = set(zipfile.ZipFile(archives[1]).namelist())
    package = {f"faststeer/{name}" for name in files("faststeer") if not name.startswith("kernels")}
    sources = {f"faststeer/csrc/{name}" for name in files("csrc")}
    kernels = {f"faststeer/kernels/{name}" for name in files("kernels/triton")}
    assert {"faststeer/py.typed", "faststeer/demo/model/model.safetensors"} <= package and sources and kernels
    assert {name for name in names if ".dist-info/" not in name} == package | sources | kernels


def test_the_source_distribution_builds_and_holds_no_tests(archives):
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{name}" for name in files("csrc")} <= names
    assert {f"kernels/triton/{name}" for name in files("kernels/triton")} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]


def requirements(name: str, known: dict[str, metadata.Distribution]) -> None:
    """Add the distribution of that name, and whatever it requires without an extra."""
    distribution = metadata.distribution(name)
    if distribution.name not in known:
        known[distribution.name] = distribution
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                requirements(requirement.name, known)


def test_the_wheel_steers_where_only_torch_and_transformers_are_installed(archives, tmp_path):
    """pip refuses the wheel if it requires more than these two bring. No extra can be imported there."""
    venv.create(tmp_path / "empty", symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip())
    installed: dict[str, metadata.Distribution] = {}
    for name in ("torch", "transformers"):
        requirements(name, installed)
    for distribution in installed.values():
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    call(sys.executable, "-m", "pip", "--quiet", "--python", python, "install", archives[1], folder=tmp_path)
    assert not (site / "scipy").exists() and not (site / "matplotlib").exists()
    assert call(python, "-c", STEERED.format(site=str(site)), folder=tmp_path).split() == ["True", "False"]
    version = call(tmp_path / "empty" / "bin" / "faststeer", "--version", folder=tmp_path)
    assert version.split()[-1] == archives[1].name.split("-")[1]
