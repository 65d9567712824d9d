"""What the site has beyond Markdown: the reference of the public API and of the command line, and copies of the
repository's files that pages link to. mkdocs runs it (`make docs`)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Page: its title, and the packages whose public names it shows.
REFERENCE = {
    "steering": ("Steering", ("", "hf")),
    "extract": ("Finding vectors", ("extract", "behaviours")),
    "evaluate": ("Measuring", ("evaluate", "report")),
    "observe": ("Looking inside", ("observe",)),
    "files": ("Files and weights", ("formats", "folding")),
    "ops": ("Operators", ("ops",)),
}
LINK = re.compile(r"(\]\()((?:\.\./)+)([^)#\s]+)")  # to what lies outside docs/


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, and every file of the repository that a page links to."""
    shown: set[str] = set()
    for page, (title, packages) in REFERENCE.items():
        blocks = [block for package in packages for block in _blocks(package, shown)]
        files.append(File.generated(config, f"reference/{page}.md", content="\n\n".join([f"# {title}", *blocks])))
    files.append(File.generated(config, "reference/cli.md", content=_command_line()))
    links = (match for page in files.documentation_pages() for match in LINK.finditer(page.content_string))
    for target in sorted({match[3] for match in links}):
        if not (ROOT / target).is_file():
            raise PluginError(f"a page links to {target}, which is no file of the repository")
        files.append(File.generated(config, f"files/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs/ to the copies of those files."""
    return LINK.sub(rf"\1{'../' * page.file.src_uri.count('/')}files/\3", markdown)


def _blocks(package: str, shown: set[str]) -> list[str]:
    """A block of mkdocstrings for each public name of a package that no page shows yet."""
    full = ".".join(["faststeer", *filter(None, [package])])
    tree = ast.parse((ROOT / full.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {alias.name for node in imports if node.module == full for alias in node.names}
    assigned = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    public: list[str] = ast.literal_eval(assigned["__all__"])
    names = [name for name in public if not name.startswith("_") and name not in shown | modules]
    shown.update(names)
    return [f"::: {full}.{name}" for name in names]


def _command_line() -> str:
    call = [sys.executable, "-m", "typer", "faststeer.cli", "utils", "docs", "--name", "faststeer"]
    made = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    if made.returncode:
        raise PluginError(f"the command line's reference was not made: {made.stderr[-500:]}")
    return made.stdout.replace("# `faststeer`", "# Command line", 1)
