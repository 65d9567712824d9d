"""What every page of ours is: one HTML file with its style, script, Plotly and data inside, whose content security
policy names the scripts by their hashes and allows no request at all."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faststeer.extras import needed_for

TEMPLATES = Path(__file__).parent / "templates"


def render(name: str, context: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """Return the page of the template `name.html` in `base.html`, with `name.js` behind `common.js` as its script.

    Args:
        context: what the template is given; markup in it is escaped.
        data: texts that the script unpacks by name; nothing in them can be read as markup.

    Raises:
        ImportError: Jinja or Plotly is not installed.
    """
    with needed_for("the page", "report"):
        import jinja2
        from plotly.offline import get_plotlyjs, get_plotlyjs_version
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    plotly = get_plotlyjs()
    script = "".join((TEMPLATES / file).read_text(encoding="utf-8") for file in ("common.js", f"{name}.js"))
    return environment.get_template(f"{name}.html").render(
        **context,
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        hashes=[_hash(script), _hash(plotly)],
        plotly_version=get_plotlyjs_version(),
        plotly=pack(plotly),
        data={key: pack(text) for key, text in data.items()},
    )


def pack(text: str) -> str:
    """Gzip, then base64: nothing in it can be read as markup."""
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), 6, mtime=0)).decode()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
