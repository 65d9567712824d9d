"""What pyproject.toml cannot say: how the compiled back ends join in.

`FASTSTEER_BUILD` says what is built: `auto` (what this machine can: nothing without torch or without a compiler),
`none` (a pure wheel), `cpu`, `cuda` or `all` (that, or fail). A wheel with a compiled part is one for this platform and
Python; one without is for any. Either has csrc/ inside, as faststeer/csrc, so that `python -m faststeer.build` works
after any install; an editable install is built in place, from csrc/ at the root.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
WANTED = ("auto", "none", "cpu", "cuda", "all")


def wanted() -> str:
    value = os.environ.get("FASTSTEER_BUILD", "auto")
    if value not in WANTED:
        raise SystemExit(f"FASTSTEER_BUILD={value!r}: expected {', '.join(WANTED)}")
    return value


def load_build() -> ModuleType:
    """faststeer/build.py by itself: faststeer's own import needs torch and more."""
    spec = importlib.util.spec_from_file_location("faststeer_build", ROOT / "faststeer" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compile_into(package: Path, work: Path | None) -> None:
    """Build what is wanted into the package folder."""
    if wanted() == "none":
        return
    build = load_build()
    try:
        build.build_all(wanted(), package, work)
    except build.BuildError as error:
        raise SystemExit(f"FASTSTEER_BUILD={wanted()}: {error}") from None


class BuildPy(build_py):
    """Python files, then csrc/ and what is compiled from it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            compile_into(ROOT / "faststeer", None)
            return
        package = Path(self.build_lib) / "faststeer"
        for left in (package / "lib", package / "csrc", *package.glob("_native*")):  # from an earlier build
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        shutil.copytree(ROOT / "csrc", package / "csrc")
        compile_into(package, Path(self.get_finalized_command("build").build_temp))


class BdistWheel(bdist_wheel):
    """A wheel is pure unless something was compiled, which is known only once it was."""

    def run(self) -> None:
        self.run_command("build")
        package = Path(self.get_finalized_command("build").build_lib) / "faststeer"
        compiled = any(package.rglob("*.so"))
        self.root_is_pure = not compiled
        self.distribution.has_ext_modules = lambda: compiled
        super().run()


if __name__ == "__main__":
    wanted()
    setup(
        # kernels/ is no package of its own: on sys.path it would hide the `kernels` that transformers looks for.
        packages=[*find_packages(include=["faststeer", "faststeer.*"]), "faststeer.kernels"],
        package_dir={"faststeer.kernels": "kernels/triton"},
        cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    )
