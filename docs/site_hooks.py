"""What the site has beyond Markdown: the reference of the public API, of the command line and of plans, and copies of
the repository's files that pages link to. mkdocs runs it (`make docs`)."""

from __future__ import annotations

import ast
import json
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
    schema = json.loads(_output_of("faststeer", "plan", "--schema"))
    files.append(File.generated(config, "reference/plan.schema.json", content=json.dumps(schema, indent=2)))
    files.append(File.generated(config, "reference/plan.md", content=_plan_page(schema)))
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
    text = _output_of("typer", "faststeer.cli", "utils", "docs", "--name", "faststeer")
    return text.replace("# `faststeer`", "# Command line", 1)


def _output_of(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise PluginError(f"{module} {' '.join(arguments)} failed: {done.stderr[-500:]}")
    return done.stdout


def _plan_page(schema: dict[str, Any]) -> str:
    """The fields of plans as tables, by kind of intervention, and the schema's file."""
    example = (ROOT / "examples" / "plans" / "add.json").read_text(encoding="utf-8")
    parts = [
        "# Plans as JSON",
        "A plan's file is one JSON object. `Plan.save` and `faststeer plan` write it, `Plan.load` reads it. Its JSON "
        "Schema (draft 2020-12) is [plan.schema.json](plan.schema.json); `faststeer plan --schema` prints it.",
        f"```json\n{example}```",
        "`interventions` act in their order. A plan holds `format` and `interventions`, nothing else.",
        "## Directions",
        "Where a field takes a direction, it is one of these objects, with no other field:",
        _table(
            ["object", "is"],
            [[f"`{_form(form)}`", form["description"]] for form in schema["$defs"]["direction"]["oneOf"]],
        ),
    ]
    for name, kind in schema["$defs"].items():
        if name != "direction":
            rows = [
                [f"`{field}`", _type(value), _default(value), value.get("description", "")]
                for field, value in kind["properties"].items()
            ]
            parts += [f"## {name}", kind["description"], _table(["field", "takes", "default", "is"], rows)]
    parts += [
        "## What the schema cannot say",
        "`Plan.load` also refuses a range of positions that selects no token, a `Clamp` whose `low` is above its "
        "`high`, a name or file that is not there, and content that is no vector. Whether a plan fits a model (its "
        "layers, its hidden size, its hook points) is checked when it is applied.",
    ]
    return "\n\n".join(parts) + "\n"


def _form(form: dict[str, Any]) -> str:
    values = {name: "base64" if "contentEncoding" in value else "..." for name, value in form["properties"].items()}
    texts = (f'"{name}": {value}' for name, value in values.items())
    return "{" + ", ".join(texts) + "}"


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()}s)" if name == "direction" else f"[{name}](#{name.lower()})"
    if "oneOf" in value:
        return ", or ".join(_type(one) for one in value["oneOf"])
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{json.dumps(one)}`" for one in value["enum"])
    if value["type"] == "array":
        return f"a list of {_type(value['items'])}"
    names = value["type"] if isinstance(value["type"], list) else [value["type"]]
    return " or ".join(names)


def _default(value: dict[str, Any]) -> str:
    return f"`{json.dumps(value['default'])}`" if "default" in value else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
