"""Building: what is built when, what is refused and how, and that nothing out of date or unfit is loaded.

Nearly all run no compiler; the last ones use what is built."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

from faststeer import build
from faststeer.ops import tables

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package folder in which nothing is built."""
    (tmp_path / "faststeer").mkdir()
    return tmp_path / "faststeer"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of csrc/ that a test may change."""
    copy = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    monkeypatch.setattr(build, "source_folder", lambda: copy)
    return copy


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs no compiler: the commands of a build, each of which makes an empty file."""
    ran: list[list[str]] = []

    def run(command: list[str], folder: Path | None = None) -> str:
        if folder is None:
            answers = {"-dumpmachine": "x86_64-linux-gnu\n", "--list-gpu-code": "sm_90\nsm_100\n"}
            return answers.get(command[-1], "g++ 12\n")
        ran.append(list(command))
        (folder / command[command.index("-o") + 1]).write_text("")
        return ""

    monkeypatch.setattr(build, "run", run)
    monkeypatch.setattr(build.shutil, "which", lambda name, **_: None if name == "ninja" else f"/bin/{name}")
    return ran


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these modules or programs were not there."""
    find_spec, which = importlib.util.find_spec, shutil.which
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None if name in names else find_spec(name))
    monkeypatch.setattr(
        build.shutil, "which", lambda name, **kw: None if Path(name).name in names else which(name, **kw)
    )


class TestWhatIsBuilt:
    def test_auto_without_torch_builds_nothing_and_says_why(self, package, monkeypatch, capsys):
        without(monkeypatch, "torch")
        reasons = build.build_all("auto", package)
        assert set(reasons) == {"cpu", "native", "cuda"}
        assert all("torch cannot be imported" in reason for reason in reasons.values())
        assert len(capsys.readouterr().out.splitlines()) == 3
        assert list(package.iterdir()) == []

    @pytest.mark.parametrize("wanted", ["cpu", "cuda", "all"])
    def test_an_explicit_choice_without_torch_fails(self, package, monkeypatch, wanted):
        without(monkeypatch, "torch")
        with pytest.raises(build.BuildError, match="was asked for and cannot be built: torch cannot be imported"):
            build.build_all(wanted, package)

    def test_an_explicit_choice_without_a_compiler_fails(self, package, monkeypatch):
        monkeypatch.delenv("CXX", raising=False)
        without(monkeypatch, "g++", "c++", "clang++")
        with pytest.raises(
            build.BuildError, match="cpu was asked for and cannot be built: there is no C\\+\\+ compiler"
        ):
            build.build_all("cpu", package)

    def test_a_compiler_that_is_named_and_not_there_is_an_error_and_not_replaced(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler -m64")
        with pytest.raises(build.BuildError, match="CXX is 'no-such-compiler -m64'"):
            build.find_cxx()

    def test_cuda_without_nvcc_fails(self, package, monkeypatch):
        for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        without(monkeypatch, "nvcc")
        with pytest.raises(build.BuildError, match="cuda was asked for and cannot be built: there is no nvcc"):
            build.build_all("cuda", package)

    def test_a_torch_that_is_too_old_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "version.py").write_text("__version__ = '2.10.1+cpu'\n")
        where = {"submodule_search_locations": [str(tmp_path)]}
        spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py", **where)
        monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
        with pytest.raises(build.BuildError, match=r"torch 2\.10\.1\+cpu is too old: 2\.11"):
            build.torch_folder()

    def test_the_compilers_message_is_shown(self, package, sources):
        (sources / "bindings.cpp").write_text("this is no C++;\n")
        with pytest.raises(build.BuildError, match="this is no C"):
            build.build("native", package)
        assert not build.library_path("native", package).exists()

    def test_auto_shows_one_line_of_it(self, package, monkeypatch, capsys):
        def fail(*_):
            raise build.BuildError("g++ -c a.cpp\nIn file a.h:\na.h:1:2: error: no\nmore")

        monkeypatch.setattr(build, "build", fail)
        build.build_all("auto", package)
        assert capsys.readouterr().out.splitlines()[0] == "faststeer: cpu: not built: a.h:1:2: error: no"

    def test_architectures_can_be_chosen(self, commands, monkeypatch):
        assert build.cuda_archs("nvcc") == ["90", "100"], "of the default ones those that nvcc knows"
        monkeypatch.setenv("FASTSTEER_CUDA_ARCHS", "80;90a")
        assert build.cuda_archs("nvcc") == ["80", "90a"]
        monkeypatch.setenv("FASTSTEER_CUDA_ARCHS", "hopper")
        with pytest.raises(build.BuildError, match="'hopper'"):
            build.cuda_archs("nvcc")


class TestNothingIsDoneTwice:
    @pytest.mark.parametrize("name", ["cpu", "native", "cuda"])
    def test_an_unchanged_build_runs_no_command(self, package, sources, commands, name):
        assert build.build(name, package)
        assert build.library_path(name, package).exists() and build.obstacle(name, package) is None
        commands.clear()
        assert not build.build(name, package)
        assert commands == []

    def test_changed_sources_are_built_again(self, package, sources, commands):
        build.build("cpu", package)
        (sources / "common" / "tables.h").write_text("// changed\n")
        assert build.build("cpu", package)

    def test_levels_are_linked_in_ascending_order(self, package, sources, commands):
        build.build("cpu", package)
        levels = [word for word in commands[-1] if word.startswith("rows_")]
        assert levels == ["rows_baseline.o", "rows_avx2.o", "rows_avx512.o"]


class TestDigest:
    def test_a_library_depends_on_its_own_sources_only(self, sources):
        before = {name: build.digest(name) for name in build.PARTS}
        (sources / "cpu" / "row.h").write_text("// changed\n")
        assert [name for name in build.PARTS if build.digest(name) != before[name]] == ["cpu"]

    def test_flags_and_file_names_count(self, sources, monkeypatch):
        before = build.digest("cpu")
        (sources / "cpu" / "row.h").rename(sources / "cpu" / "line.h")
        renamed = build.digest("cpu")
        monkeypatch.setattr(build, "CXX_FLAGS", (*build.CXX_FLAGS, "-g"))
        assert len({before, renamed, build.digest("cpu")}) == 3

    def test_other_files_do_not_count(self, sources):
        before = build.digest("cpu")
        (sources / "cpu" / "row.h~").write_text("an editor's copy")
        assert build.digest("cpu") == before


class TestLoading:
    def test_what_is_not_built_is_no_error(self, package):
        assert build.obstacle("cpu", package) == "not built: python -m faststeer.build cpu"
        assert build.obstacle("cuda", package) == "not built: python -m faststeer.build cuda"

    def test_a_library_of_other_sources_is_not_loaded(self, package, sources, commands):
        build.build("cpu", package)
        (sources / "cpu" / "ops.cpp").write_text("// changed\n")
        assert build.obstacle("cpu", package) == "built from other sources than these: python -m faststeer.build cpu"

    def test_a_record_that_cannot_be_read_counts_as_none(self, package, sources, commands):
        build.build("cpu", package)
        build.record_path("cpu", package).write_text("{")
        assert build.obstacle("cpu", package).startswith("not built")

    def test_an_unfit_library_is_a_reason_and_no_exception(self, package, sources, commands, monkeypatch):
        build.build("cpu", package)  # an empty file
        path = build.library_path("cpu", package)
        monkeypatch.setattr(build, "library_path", lambda name: path)
        monkeypatch.setattr(build, "obstacle", lambda name: None)
        assert build._load("cpu").startswith("cannot be loaded: ")

    def test_a_torch_that_is_too_old(self, monkeypatch):
        monkeypatch.setattr(build, "obstacle", lambda name: None)
        monkeypatch.setattr(torch, "__version__", "2.10.0")
        assert build._load("cpu") == "PyTorch 2.10.0 is too old for it: 2.11 or later is needed"

    def test_cuda_is_not_loaded_into_a_torch_without(self, monkeypatch):
        monkeypatch.setattr(build, "obstacle", lambda name: None)
        monkeypatch.setattr(torch.version, "cuda", None)
        assert build._load("cuda") == "built, but this PyTorch is without CUDA"


def test_the_command_line_fails_with_the_reason(monkeypatch, capsys):
    without(monkeypatch, "torch")
    assert build.main(["cpu"]) == 1
    assert "cpu was asked for and cannot be built" in capsys.readouterr().err
    assert build.main([]) == 0


class TestSetup:
    @pytest.fixture
    def checkout(self, tmp_path, monkeypatch) -> Path:
        """A checkout with little in it."""
        root = tmp_path / "checkout"
        (root / "faststeer").mkdir(parents=True)
        for name in ("setup.py", "MANIFEST.in", "faststeer/build.py"):
            shutil.copy(ROOT / name, root / name)
        (root / "faststeer" / "__init__.py").touch()
        shutil.copytree(ROOT / "csrc", root / "csrc")
        monkeypatch.chdir(root)
        return root

    def wheel(self, checkout: Path, monkeypatch: pytest.MonkeyPatch, built: str | None) -> zipfile.ZipFile:
        """The wheel that setup.py makes there when building gives this file."""
        module = load(checkout / "setup.py")

        def build_all(wanted: str, package: Path, work: Path) -> None:
            if built:
                (package / "lib").mkdir()
                (package / built).touch()

        stub = ModuleType("stub")
        stub.build_all, stub.BuildError = build_all, build.BuildError
        monkeypatch.setattr(module, "load_build", lambda: stub)
        scratch = tempfile.mkdtemp(dir=checkout)  # distutils takes a folder that it made before for still there
        arguments = ["-q", "bdist_wheel", f"--bdist-dir={scratch}"]
        commands = {"build_py": module.BuildPy, "bdist_wheel": module.BdistWheel}
        setuptools.setup(name="faststeer", packages=["faststeer"], cmdclass=commands, script_args=arguments)
        return zipfile.ZipFile(next((checkout / "dist").glob("*.whl")))

    def test_without_a_compiled_part_the_wheel_is_pure(self, checkout, monkeypatch):
        wheel = self.wheel(checkout, monkeypatch, None)
        assert wheel.filename.endswith("-py3-none-any.whl")
        assert "faststeer/csrc/common/tables.h" in wheel.namelist()
        assert "Root-Is-Purelib: true" in wheel.read("faststeer-0.0.0.dist-info/WHEEL").decode()

    def test_with_one_the_wheel_is_for_this_platform(self, checkout, monkeypatch):
        wheel = self.wheel(checkout, monkeypatch, "lib/faststeer_cpu.so")
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        assert re.search(rf"-{tag}-{tag}-\w+\.whl$", wheel.filename) and not wheel.filename.endswith("any.whl")
        assert "faststeer/lib/faststeer_cpu.so" in wheel.namelist()
        assert "Root-Is-Purelib: false" in wheel.read("faststeer-0.0.0.dist-info/WHEEL").decode()

    def test_what_an_earlier_build_left_does_not_get_in(self, checkout, monkeypatch):
        self.wheel(checkout, monkeypatch, "lib/faststeer_cpu.so").close()
        shutil.rmtree(checkout / "dist")
        assert not [name for name in self.wheel(checkout, monkeypatch, None).namelist() if name.endswith(".so")]

    def test_none_builds_nothing(self, monkeypatch, package):
        module = load(ROOT / "setup.py")
        monkeypatch.setenv("FASTSTEER_BUILD", "none")
        monkeypatch.setattr(module, "load_build", lambda: pytest.fail("it looked at what to build"))
        module.compile_into(package, None)

    @pytest.mark.parametrize("value", ["cpu", "cuda"])
    def test_an_explicit_choice_fails_loudly(self, monkeypatch, package, value):
        module = load(ROOT / "setup.py")
        monkeypatch.setenv("FASTSTEER_BUILD", value)
        without(monkeypatch, "torch")
        with pytest.raises(SystemExit, match=f"FASTSTEER_BUILD={value}: {value} was asked for and cannot be built"):
            module.compile_into(package, None)

    def test_an_unknown_choice_fails_loudly(self, monkeypatch):
        monkeypatch.setenv("FASTSTEER_BUILD", "gpu")
        with pytest.raises(SystemExit, match="'gpu': expected auto, none, cpu, cuda, all"):
            load(ROOT / "setup.py").wanted()

    def test_torch_is_no_build_requirement(self):
        text = (ROOT / "pyproject.toml").read_text()
        requires = re.search(r"(?ms)^\[build-system\].*?^requires = \[(.*?)\]", text).group(1)
        assert "setuptools" in requires and "torch" not in requires

    def test_a_source_distribution_has_all_sources(self, checkout):
        setuptools.setup(name="faststeer", packages=["faststeer"], script_args=["-q", "sdist", "--formats=zip"])
        archive = zipfile.ZipFile(next((checkout / "dist").glob("*.zip")))
        names = {name.split("/", 1)[1] for name in archive.namelist()}
        sources = {path.relative_to(checkout).as_posix() for path in (checkout / "csrc").rglob("*") if path.is_file()}
        assert sources and sources <= names


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("faststeer_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestHeaderAgreesWithPython:
    """csrc/common/tables.h numbers what faststeer/ops/tables.py names."""

    header = (ROOT / "csrc" / "common" / "tables.h").read_text()

    def enum(self, name: str) -> dict[str, int]:
        body = re.search(rf"enum {name} : int32_t {{(.*?)}};", self.header, re.DOTALL).group(1)
        return {word: i for i, word in enumerate(re.findall(r"\w+", body))}

    def test_kinds(self):
        assert self.enum("Kind") == {
            **{kind.name: kind.value for kind in tables.EntryKind},
            "N_KINDS": len(tables.EntryKind),
        }

    def test_gate_modes(self):
        assert self.enum("GateMode") == {f"GATE_{mode.name}": mode.value for mode in tables.GateMode}

    def test_an_entry_has_its_fields_in_order(self):
        body = re.search(r"struct alignas\(16\) Entry {(.*?)};", self.header, re.DOTALL).group(1)
        columns: dict[str, int] = {}
        count = 0
        for type_, names in re.findall(r"(int32_t|float) ([^;]+);", body):
            for name, size in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
                columns[name.upper()] = count
                assert type_ == ("float" if count >= tables.Field.A else "int32_t")
                count += int(size or 1)
        assert count == tables.N_FIELDS
        assert {field.name: field.value for field in tables.Field}.items() <= columns.items()

    def test_sizes(self):
        found = re.search(r"N_SCALARS = (\d+), N_PLACES = (\d+);", self.header)
        assert tuple(map(int, found.groups())) == (tables.N_SCALARS, tables.N_PLACES)


@pytest.fixture(scope="module")
def native() -> ModuleType:
    module = build.native()
    if module is None:
        pytest.fail(f"faststeer._native must be there where the tests run: {build.obstacle('native')}")
    return module


class TestNative:
    def test_build_info(self, native):
        info = native.build_info()
        assert set(info) == {"compiler", "flags", "torch", "cpu_isa_compiled", "cpu_isa_usable", "cpu_isa"}
        assert info["cpu_isa_compiled"][0] == "baseline" and info["cpu_isa"] in info["cpu_isa_usable"]
        assert "-ffp-contract=off" in info["flags"] and "fast-math" not in info["flags"]
        assert info["torch"] == build.torch_version(build.torch_folder())

    @pytest.mark.parametrize(("wanted", "code"), [("baseline", 0), ("sse9", 1)])
    def test_a_level_can_be_chosen_and_is_never_replaced(self, native, wanted, code, monkeypatch):
        monkeypatch.setenv("FASTSTEER_CPU_ISA", wanted)
        if code:
            with pytest.raises(RuntimeError, match=r"FASTSTEER_CPU_ISA must be baseline, avx2 or avx512.*sse9"):
                native.build_info()
        else:
            assert native.build_info()["cpu_isa"] == wanted


def test_the_levels_give_the_same_bits(tmp_path):
    """Sums have one order at every instruction set level, and conversions one result."""
    if build.load()["cpu"] is not None:
        pytest.fail(f"the CPU library must be there where the tests run: {build.load()['cpu']}")
    script = """
import sys, torch
import faststeer as fs
from faststeer import build
from faststeer.ops import schema
assert build.load()["cpu"] is None
g = torch.Generator().manual_seed(0)
hidden = 1111
program = fs.Program(1, hidden, fs.Capacity(slots=1, vectors=9, entries=9))
v = torch.randn(4, hidden, generator=g)
rotate = fs.Rotate(v[2], v[3], degrees=40, layers=0, keep_norm=True)
program.load(0, fs.Plan([fs.Add(v[0], 0.7, layers=0), fs.Ablate(v[1:3], layers=0, probe=True), rotate]))
t = program.tables(4)
arguments = *t[:3], torch.zeros(3, 9, dtype=torch.int32), None
results = []
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    x, residual = (torch.randn(9, hidden, generator=g).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, generator=g).to(dtype)
    results += torch.ops.faststeer.add_steer_rmsnorm.cpp(x, residual, weight, 1e-6, 0.0, False, *arguments, None, 2)
    # Any bits at all, and a vector of such: a NaN keeps neither its payload nor its sign at every level.
    patterns = torch.randint(-(2**31), 2**31, (10, 1111), generator=g, dtype=torch.int64).int().view(torch.float32)
    rows = patterns[:9].view(dtype)[:, -hidden:].clone()
    strange = t.bank.clone()
    strange[:, ::3] = patterns[9, ::3]
    steered, _ = torch.ops.faststeer.steer.cpp(rows, strange, *arguments[1:], None, 0)
    results.append(steered.nan_to_num(nan=1.25))
    pair = x.clone(), residual.clone(), torch.zeros(9, 2)
    torch.ops.faststeer.steer_pair_.cpp(*pair[:2], *arguments, pair[2])
    results += pair
torch.save(results, sys.argv[1])
"""
    native = build.native()
    results = {}
    for level in native.build_info()["cpu_isa_usable"]:
        path = tmp_path / f"{level}.pt"
        environment = {**os.environ, "FASTSTEER_CPU_ISA": level}
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment, cwd=ROOT)
        results[level] = torch.load(path)
    for level, result in results.items():
        for one, other in zip(result, results["baseline"], strict=True):
            assert torch.equal(one, other), level


def test_records_say_what_was_built():
    record = json.loads(build.record_path("cpu").read_text())
    assert record["digest"] == build.digest("cpu") and tuple(record["target"]) == build.TORCH_TARGET
