"""A checkout without an installation is importable as the package is, and carries libraries compiled elsewhere."""

import json
import os
import subprocess
import sys
import zipfile

import checkout
import pytest
from benchmark_programs import ROOT, load


@pytest.fixture
def prebuilt(tmp_path):
    """A folder as benchmarks/gpu/libraries.py fills it, for sm_90, with files that are not libraries."""
    folder = tmp_path / "prebuilt"
    (folder / "lib").mkdir(parents=True)
    for name in ("cpu", "cuda"):
        (folder / "lib" / f"faststeer_{name}.so").write_text(f"{name} from elsewhere")
        (folder / "lib" / f"{name}.json").write_text("{}")
    (folder / checkout.MANIFEST).write_text(json.dumps({"archs": ["90"], "torch_target": [2, 11]}))
    return folder


@pytest.fixture
def package(tmp_path):
    (tmp_path / "site" / "faststeer").mkdir(parents=True)
    return tmp_path / "site" / "faststeer"


def test_the_package_comes_from_the_site_with_its_kernels(tmp_path):
    package = checkout.install(tmp_path / "site")
    code = (
        "import importlib.util as u, faststeer, faststeer.build as b;"
        "print(faststeer.__file__, u.find_spec('faststeer.kernels').origin, b.source_folder())"
    )
    environment = os.environ | {"PYTHONPATH": checkout.python_path(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    expected = [package / "__init__.py", package / "kernels" / "__init__.py", package / "csrc"]
    assert done.stdout.split() == [str(path.resolve()) for path in expected]
    assert not list(package.rglob("__pycache__/*.o")) and not (package / "lib" / "build").exists()


def test_the_checkout_is_left_alone(tmp_path, prebuilt):
    package = checkout.install(tmp_path / "site")
    library = ROOT / "faststeer" / "lib" / "faststeer_cpu.so"
    before = library.read_bytes() if library.exists() else None
    checkout.put_libraries(package, prebuilt, None, "2.11.0")
    assert (package / "lib" / "faststeer_cpu.so").read_text() == "cpu from elsewhere"
    assert (library.read_bytes() if library.exists() else None) == before


@pytest.mark.parametrize(("archs", "arch", "runs"), [
    (["90"], "90", True), (["80"], "86", True), (["80"], "89", True), (["86"], "80", False), (["90"], "80", False),
    (["90"], "100", True),  # its PTX
    (["80", "90", "100"], "120", True), (["80", "100"], "90", False), (["90a"], "90", True), (["90a"], "100", False),
    (["100f"], "103", False), (["80", "90a"], "120", False), (["75", "80"], "90", True),
])  # fmt: skip
def test_which_code_runs_on_which_gpu(archs, arch, runs):
    assert checkout.fits(archs, arch) is runs


def test_libraries_that_fit_are_put_in_place(package, prebuilt):
    checkout.put_libraries(package, prebuilt, "90", "2.11.0+cu130")
    assert sorted(path.name for path in (package / "lib").iterdir()) == [
        "cpu.json", "cuda.json", "faststeer_cpu.so", "faststeer_cuda.so",
    ]  # fmt: skip


def test_another_gpu_leaves_the_cuda_library_out(package, prebuilt):
    with pytest.raises(checkout.Unfit, match=r"compiled for sm_90, this GPU is sm_80"):
        checkout.put_libraries(package, prebuilt, "80", "2.11.0")
    assert not (package / "lib" / "faststeer_cuda.so").exists()


@pytest.mark.parametrize("version", ["2.10.0", "1.13"])
def test_another_pytorch_leaves_all_out(package, prebuilt, version):
    with pytest.raises(checkout.Unfit, match=rf"need PyTorch 2\.11 or later, here is {version}"):
        checkout.put_libraries(package, prebuilt, "90", version)
    assert not (package / "lib").exists()


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"archs": 3, "torch_target": [2, 11]}'])
def test_a_folder_without_libraries(package, prebuilt, manifest):
    (prebuilt / checkout.MANIFEST).unlink()
    if manifest is not None:
        (prebuilt / checkout.MANIFEST).write_text(manifest)
    with pytest.raises(checkout.Unfit, match="make gpu-libraries"):
        checkout.put_libraries(package, prebuilt, "90", "2.11.0")


def test_libraries_of_other_sources_are_not_taken(tmp_path, prebuilt):
    """prepare.py compiles them anew, or says that it cannot."""
    package = checkout.install(tmp_path / "site")
    checkout.put_libraries(package, prebuilt, "90", "2.11.0")
    build = load("gpu/libraries.py").load_build(package)
    assert "built from other sources than these" in build.obstacle("cuda", package)


def test_without_a_compiler_it_is_said(tmp_path):
    package = checkout.install(tmp_path / "site")
    (package / "lib" / "faststeer_cuda.so").unlink(missing_ok=True)
    environment = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "CUDACXX": "/no/nvcc", "CXX": "/no/g++"}
    for name, missing in (("cuda", "nvcc"), ("cpu", "CXX")):
        if name == "cuda" and os.path.exists("/usr/local/cuda/bin/nvcc"):
            missing = "CXX"  # the toolkit is looked for in its usual place, too
        (package / "lib" / f"{name}.json").unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "benchmarks/gpu/prepare.py"), str(package), name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1].startswith(f"cannot be compiled here: {name}: ") and missing in done.stdout


def test_wheels_are_unpacked(tmp_path, prebuilt):
    with zipfile.ZipFile(prebuilt / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_a_test/__init__.py", "NAME = 'peer'\n")
    assert checkout.unpack_wheels(prebuilt, tmp_path / "wheels") == ["peer-1.0-py3-none-any.whl"]
    command = [sys.executable, "-c", "import peer_of_a_test; print(peer_of_a_test.NAME)"]
    environment = os.environ | {"PYTHONPATH": checkout.python_path(tmp_path / "wheels")}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "peer\n"


class Compiler:
    """faststeer/build.py, but for the compiling."""

    TORCH_TARGET = (2, 11)
    find_nvcc = torch_folder = staticmethod(lambda: "somewhere")
    cuda_archs = staticmethod(lambda nvcc: ["80", "90"])
    torch_version = staticmethod(lambda folder: "2.13.0")

    def __init__(self, broken: str | None = None) -> None:
        self.broken, self.calls = broken, []

    def build(self, name, package, work):
        self.calls.append((name, package, work))
        if name == self.broken:
            raise RuntimeError(f"{name} cannot be compiled")
        (package / "lib").mkdir(exist_ok=True)
        (package / "lib" / f"faststeer_{name}.so").write_text(name)
        (package / "lib" / f"{name}.json").write_text("{}")
        return True


class TestCompilingBeforehand:
    def test_what_is_compiled_can_be_put_in_place(self, tmp_path, package, monkeypatch):
        libraries, compiler, folder = load("gpu/libraries.py"), Compiler(), tmp_path / "libraries"
        monkeypatch.setattr(libraries, "load_build", lambda _: compiler)
        assert libraries.compile_into(folder) == ["80", "90"]
        assert all(not work.is_relative_to(folder) for _, _, work in compiler.calls)  # objects are not carried
        checkout.put_libraries(package, folder, "90", "2.11.0")
        assert (package / "lib" / "faststeer_cuda.so").read_text() == "cuda"

    def test_half_a_build_is_no_folder_of_libraries(self, tmp_path, package, prebuilt, monkeypatch, capsys):
        libraries = load("gpu/libraries.py")
        monkeypatch.setattr(libraries, "load_build", lambda _: Compiler("cuda"))
        monkeypatch.setattr(sys, "argv", ["libraries.py", str(prebuilt)])
        assert libraries.main() == 1 and "cuda cannot be compiled" in capsys.readouterr().err
        with pytest.raises(checkout.Unfit):
            checkout.put_libraries(package, prebuilt, "90", "2.11.0")
