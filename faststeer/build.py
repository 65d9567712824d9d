"""Builds the compiled back ends and finds them again.

    python -m faststeer.build            what this machine can build, and one line each on what it cannot
    python -m faststeer.build cpu        that one, or fail: cpu, cuda or all

Three shared objects come out, beside this file: `lib/faststeer_cpu.so` and `lib/faststeer_cuda.so` register operators
through torch's stable ABI, so that one build serves every later torch; `_native` is a pybind11 module for this Python.
The CUDA library needs nvcc but neither a GPU nor a torch with CUDA. Sources are `csrc/`, at the root of a checkout or,
in an installed package, inside it. ninja is used where there is one; without, everything is compiled anew.

Environment: CXX, CUDACXX or CUDA_HOME, and FASTSTEER_CUDA_ARCHS ("90;100": compute capabilities without the dot).

This file imports nothing but the standard library until something is loaded: setup.py runs it by itself, where neither
faststeer's nor its dependencies' import would work.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
TORCH_TARGET = (2, 11)  # the oldest torch that a build runs with
# How the reason begins why a library that is built is not used.
UNFIT = ("built from other sources than these", "cannot be loaded")
CHOICES = ("auto", "cpu", "cuda", "all")

# -ffp-contract=off: a fused multiply-add would round differently from the hand-written hook. No -ffast-math, for NaN
# and infinity. -O3 without errno for sqrt and without trapping is what lets loops be vectorised.
CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# In ascending order: should the linker find one inline function in several levels' objects, it keeps the first, which
# every machine can run.
CPU_LEVELS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    # Where there is no prefetchw, on Intel's Haswell, it does nothing.
    "avx2": ("-mavx2", "-mf16c", "-mfma", "-mprfchw"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c", "-mprfchw"),
        "-mprefer-vector-width=512",
    ),
}
NVCC_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA")
# What nvcc compiles, each into an object of its own: a source in csrc/cuda, and flags.
CUDA_UNITS = {
    "ops": ("ops.cu",),
    **{
        name: ("launch.cu", f"-DFASTSTEER_ROW_TYPE={row_type}", f"-DFASTSTEER_LAUNCH={name}")
        for name, row_type in (("launch_fp32", "float"), ("launch_fp16", "__half"), ("launch_bf16", "__nv_bfloat16"))
    },
}
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")

# What each library is made of, relative to csrc/.
PARTS = {
    "cpu": ("common", "cpu"),
    "native": ("common", "cpu/isa.h", "cpu/rows.h", "prepared.h", "bindings.cpp"),
    "cuda": ("common", "cuda"),
}


class BuildError(RuntimeError):
    """Something cannot be built here; the message says what, and the compiler's message if it came to that."""


@dataclass(frozen=True)
class Step:
    """One command, which makes one file in the working folder. `@` in it stands for that file."""

    output: str
    command: tuple[str, ...]
    inputs: tuple[str, ...]  # sources as absolute paths, other steps' outputs as they are named
    compiles: bool  # then it also writes the headers it used to `<output>.d`


# Sources --------------------------------------------------------------------------------------------------------------


def source_folder() -> Path:
    """`csrc/`.

    Raises:
        BuildError: there is none: a package that was stripped of its sources.
    """
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "common" / "tables.h").exists():
            return folder
    raise BuildError(f"no sources: neither {PACKAGE / 'csrc'} nor {PACKAGE.parent / 'csrc'} is there")


def source_files(name: str) -> list[Path]:
    """All files that library `name` is made of, headers included."""
    folder = source_folder()
    sources: list[Path] = []
    for part in PARTS[name]:
        path = folder / part
        sources += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [path for path in sources if path.suffix in (".h", ".cuh", ".cpp", ".cu")]


def digest(name: str) -> str:
    """A hash of the library's sources and of how they are compiled: a build of another is out of date."""
    total = hashlib.sha256()
    recipe = CXX_FLAGS, CPU_LEVELS, NVCC_FLAGS, TORCH_TARGET
    total.update(repr(recipe).encode())
    for path in source_files(name):
        total.update(f"{path.relative_to(source_folder()).as_posix()}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


# What the machine has -------------------------------------------------------------------------------------------------


def torch_folder() -> Path:
    """The folder of the torch package, found without importing it.

    Raises:
        BuildError: there is none, or one older than TORCH_TARGET.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch cannot be imported here (pip's build isolation hides it: use --no-build-isolation, or build "
            "afterwards with python -m faststeer.build)"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if version_of(torch_version(folder)) < TORCH_TARGET:
        raise BuildError(
            f"torch {torch_version(folder)} is too old: {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or later is needed"
        )
    return folder


def torch_version(folder: Path) -> str:
    version = re.search(r"__version__ = ['\"]([^'\"]+)", (folder / "version.py").read_text())
    return version.group(1) if version else "unknown"


def torch_has_cuda(folder: Path) -> bool:
    return re.search(r"^cuda\b[^=]*= *['\"]", (folder / "version.py").read_text(), re.MULTILINE) is not None


def version_of(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def find_cxx() -> list[str]:
    """The C++ compiler as a command: CXX, else the first of g++, c++ and clang++ on PATH.

    Raises:
        BuildError: there is none.
    """
    if compiler := os.environ.get("CXX"):
        command = shlex.split(compiler)
        if shutil.which(command[0]):
            return command
        raise BuildError(f"CXX is {compiler!r}, which is no program here")
    for name in ("g++", "c++", "clang++"):
        if compiler_path := shutil.which(name):
            return [compiler_path]
    raise BuildError("there is no C++ compiler: install g++, or point CXX to one")


def find_nvcc() -> str:
    """nvcc: CUDACXX, CUDA_HOME, PATH, /usr/local/cuda, in this order.

    Raises:
        BuildError: there is none.
    """
    homes = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in (os.environ.get("CUDACXX"), *map(str, homes), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if candidate and (nvcc := shutil.which(candidate)):
            return nvcc
    raise BuildError("there is no nvcc: install the CUDA toolkit, or point CUDA_HOME to it")


def pybind11_include(torch: Path) -> Path:
    """pybind11's own headers, or those that come with torch."""
    spec = importlib.util.find_spec("pybind11")
    if spec is not None and spec.submodule_search_locations:
        include = Path(next(iter(spec.submodule_search_locations))) / "include"
        if (include / "pybind11" / "pybind11.h").exists():
            return include
    return torch / "include"


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to compile for: FASTSTEER_CUDA_ARCHS, else those of CUDA_ARCHS that this nvcc knows."""
    if named := os.environ.get("FASTSTEER_CUDA_ARCHS"):
        archs = re.split(r"[;,\s]+", named.strip())
        if not all(re.fullmatch(r"\d+[af]?", arch) for arch in archs):
            raise BuildError(f"FASTSTEER_CUDA_ARCHS is {named!r}: expected compute capabilities, such as 90;100")
        return archs
    known = set(re.findall(r"sm_(\w+)", run([nvcc, "--list-gpu-code"])))
    return [arch for arch in CUDA_ARCHS if arch in known]


def run(command: Sequence[str], folder: Path | None = None) -> str:
    """The command's output.

    Raises:
        BuildError: it failed; the message has the command and all it said.
    """
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout.strip()}")
    return done.stdout


# The steps of each library --------------------------------------------------------------------------------------------


def library_path(name: str, package: Path = PACKAGE) -> Path:
    """Where library `name` lies, whether or not it is built."""
    if name == "native":
        return package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    return package / "lib" / f"faststeer_{name}.so"


def record_path(name: str, package: Path = PACKAGE) -> Path:
    """What is noted about a build of library `name`, next to the libraries."""
    return package / "lib" / f"{name}.json"


def stable_abi(torch: Path) -> list[str]:
    major, minor = TORCH_TARGET
    return ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]


def cpu_steps(torch: Path) -> list[Step]:
    cxx, folder = find_cxx(), source_folder() / "cpu"
    levels = CPU_LEVELS if re.match(r"x86_64|amd64", run([*cxx, "-dumpmachine"]), re.IGNORECASE) else {"baseline": ()}
    steps = [_compile(cxx, "ops.o", folder / "ops.cpp", stable_abi(torch))]
    for level, flags in levels.items():
        defines = [f"-DFASTSTEER_ROUTINES=routines_{level}"]
        steps.append(_compile(cxx, f"rows_{level}.o", folder / "rows.cpp", [*defines, *flags]))
    objects = tuple(step.output for step in steps)
    link = (*cxx, "-shared", "-o", "@", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu")
    return [*steps, Step(library_path("cpu").name, link, objects, compiles=False)]


def native_steps(torch: Path) -> list[Step]:
    cxx = find_cxx()
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise BuildError(f"there is no Python.h in {python}: install Python's development files (python3-dev)")
    facts = {
        "COMPILER": run([*cxx, "--version"]).splitlines()[0],
        "FLAGS": " ".join(CXX_FLAGS),
        "TORCH": torch_version(torch),
    }
    folders = pybind11_include(torch), python, torch / "include"
    includes = [each for folder in folders for each in ("-isystem", str(folder))]
    defines = [f'-DFASTSTEER_{key}="{value}"' for key, value in facts.items()]
    compiled = _compile(cxx, "bindings.o", source_folder() / "bindings.cpp", [*includes, *defines])
    link = (*cxx, "-shared", "-o", "@", "bindings.o")
    if sys.platform == "darwin":
        link = (*link, "-undefined", "dynamic_lookup")
    return [compiled, Step(library_path("native").name, link, ("bindings.o",), compiles=False)]


def cuda_steps(torch: Path) -> list[Step]:
    nvcc, cxx = find_nvcc(), find_cxx()
    host = ("-ccbin", next(word for word in reversed(cxx) if not word.startswith("-")))  # CXX may be "ccache g++ -m64"
    archs = cuda_archs(nvcc)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # PTX, for what is newer
    common = [nvcc, *host, *NVCC_FLAGS, *codes, *stable_abi(torch)]
    steps = []
    for name, (file, *flags) in CUDA_UNITS.items():
        source = str(source_folder() / "cuda" / file)
        command = (*common, *flags, "-MD", "-MF", "@.d", "-c", source, "-o", "@")
        steps.append(Step(f"cuda_{name}.o", command, (source,), compiles=True))
    objects = tuple(step.output for step in steps)
    # The library takes the current stream from libtorch_cuda.so and must name it as one it needs, or its symbols are
    # not found when it is loaded. A torch without CUDA has none to link with: an empty one of that name does.
    stub = "libtorch_cuda.so"
    steps.append(
        Step(stub, (*cxx, "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{stub}", "-o", "@"), (), compiles=False)
    )
    shared = ("-shared", "-cudart", "static", "-Xlinker", "--no-as-needed")
    libraries = (f"-L{torch / 'lib'}", "-L.", "-ltorch_cpu", f"-l:{stub}")
    link = (nvcc, *host, *shared, *codes, "-o", "@", *objects, *libraries)
    return [*steps, Step(library_path("cuda").name, link, (*objects, stub), compiles=False)]


def _compile(cxx: Sequence[str], output: str, source: Path, flags: Iterable[str]) -> Step:
    command = (*cxx, *CXX_FLAGS, *flags, "-MMD", "-MF", "@.d", "-c", str(source), "-o", "@")
    return Step(output, command, (str(source),), compiles=True)


STEPS = {"cpu": cpu_steps, "native": native_steps, "cuda": cuda_steps}


# Building -------------------------------------------------------------------------------------------------------------


def build(name: str, package: Path = PACKAGE, work: Path | None = None) -> bool:
    """Build library `name` into `package`; False if it was there and up to date.

    Args:
        work: where object files are kept for the next time; default: in the package's `lib/`.

    Raises:
        BuildError: it cannot be built here, with the reason or the compiler's message.
    """
    torch = torch_folder()
    steps = STEPS[name](torch)
    # Everything that a build depends on but where its sources lie: a build that came with a wheel is not done again.
    commands = repr(steps).replace(str(source_folder()), "csrc").replace(str(torch), "torch")
    record = {
        "digest": digest(name),
        "commands": _hash(commands),
        "torch": torch_version(torch),
        "target": TORCH_TARGET,
    }
    target = library_path(name, package)
    if target.exists() and _read_record(name, package) == json.loads(json.dumps(record)):
        return False
    folder = (work or package / "lib" / "build") / name
    folder.mkdir(parents=True, exist_ok=True)
    record_path(name, package).parent.mkdir(exist_ok=True)
    (record_path(name, package).parent / ".gitignore").write_text("*\n")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja:
        (folder / "build.ninja").write_text(_ninja_file(steps))
        run([ninja], folder)
    else:
        _run_steps(steps, folder)
    # Renamed into place: a library that some process has loaded keeps its file.
    fresh = target.with_name(target.name + ".new")
    shutil.copy2(folder / target.name, fresh)
    fresh.replace(target)
    record_path(name, package).write_text(json.dumps(record) + "\n")
    return True


def build_all(what: str, package: Path = PACKAGE, work: Path | None = None) -> dict[str, str | None]:
    """Build what `wanted` (auto, cpu, cuda or all) says and print a line on each library. `auto` builds what can be
    used with the torch that is here.

    Returns:
        For each that was asked for, None or why it is not there, which only `auto` lets pass.

    Raises:
        BuildError: one that was asked for by name cannot be built.
    """
    names = {"cpu": ("cpu", "native"), "cuda": ("cuda", "native")}.get(what, ("cpu", "native", "cuda"))
    reasons: dict[str, str | None] = {}
    for name in names:
        try:
            if what == "auto" and name == "cuda" and not torch_has_cuda(torch_folder()):
                raise BuildError(
                    "this PyTorch is without CUDA (python -m faststeer.build cuda compiles it all the same)"
                )
            done = "built" if build(name, package, work) else "up to date"
            print(f"faststeer: {name}: {done}", flush=True)
            reasons[name] = None
        except BuildError as error:
            if what != "auto":
                raise BuildError(f"{name} was asked for and cannot be built: {error}") from None
            # One line: of a compiler's message the first that says error.
            lines = str(error).splitlines()
            reasons[name] = next((line for line in lines[1:] if "error" in line), lines[0])
            print(f"faststeer: {name}: not built: {reasons[name]}", flush=True)
    return reasons


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_record(name: str, package: Path) -> dict[str, object] | None:
    try:
        record = json.loads(record_path(name, package).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _ninja_file(steps: Sequence[Step]) -> str:
    """A rule per step, as each has flags of its own."""
    lines = ["ninja_required_version = 1.5"]
    for i, step in enumerate(steps):
        command = shlex.join(_with_output(step)).replace("$", "$$")
        lines += [f"rule r{i}", f"  command = {command}", f"  description = {step.output}"]
        if step.compiles:
            lines += ["  deps = gcc", f"  depfile = {step.output}.d"]
        lines.append(f"build {_escape(step.output)}: r{i} {' '.join(map(_escape, step.inputs))}")
    return "\n".join(lines) + "\n"


def _escape(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def _run_steps(steps: Sequence[Step], folder: Path) -> None:
    """Without ninja: all compilations side by side, then the rest in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda step: run(_with_output(step), folder), [step for step in steps if step.compiles]))
    for step in steps:
        if not step.compiles:
            run(_with_output(step), folder)


def _with_output(step: Step) -> list[str]:
    return [step.output + word[1:] if word in ("@", "@.d") else word for word in step.command]


# Loading --------------------------------------------------------------------------------------------------------------


@functools.cache
def load() -> dict[str, str | None]:
    """Load the operator libraries that are built: for each of cpu and cuda None, or why it is not there. Never
    raises."""
    return {name: _load(name) for name in ("cpu", "cuda")}


def native() -> ModuleType | None:
    """The module `faststeer._native`, or None where it is not built, or of other sources than these."""
    if obstacle("native") is not None:
        return None
    try:
        return importlib.import_module("faststeer._native")
    except ImportError:
        return None


def obstacle(name: str, package: Path = PACKAGE) -> str | None:
    """Why the library is not fit to be loaded, as far as can be told without doing it."""
    again = f"python -m faststeer.build {'cuda' if name == 'cuda' else 'cpu'}"
    record = _read_record(name, package)
    if not library_path(name, package).exists() or record is None:
        return f"not built: {again}"
    try:
        if record.get("digest") != digest(name):
            return f"{UNFIT[0]}: {again}"
    except BuildError:
        pass  # no sources to be compared with
    return None


def _load(name: str) -> str | None:
    import torch

    if reason := obstacle(name):
        return reason
    if version_of(torch.__version__) < TORCH_TARGET:
        return f"PyTorch {torch.__version__} is too old for it: {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or later is needed"
    if name == "cuda" and torch.version.cuda is None:
        return "built, but this PyTorch is without CUDA"
    try:
        torch.ops.load_library(str(library_path(name)))
    except Exception as error:  # whatever is wrong with a library must not take faststeer with it
        return f"{UNFIT[1]}: {error}; build it again: python -m faststeer.build {name}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m faststeer.build", description="Build faststeer's compiled back ends."
    )
    parser.add_argument(
        "wanted", nargs="?", default="auto", choices=CHOICES, help="default: what this machine can build"
    )
    try:
        build_all(parser.parse_args(arguments).wanted)
    except BuildError as error:
        print(f"faststeer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
