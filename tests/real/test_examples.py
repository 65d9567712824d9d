"""The notebooks of examples/ run, as they stand, and what they show is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def cells(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_run(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    names: dict[str, Any] = {}
    for cell in cells(notebook):
        exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
    if notebook.stem == "tone":
        assert names["means"][0] < names["means"][2] < names["means"][4]
    elif notebook.stem == "look_inside":
        assert torch.all(names["changed"].norm[:17] == 0) and torch.all(names["changed"].norm[17:] > 0)
    else:
        assert names["alone"].token_ids == names["together"][1].token_ids


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_with_what_it_shows(notebook):
    shown = [output for cell in cells(notebook) for output in cell["outputs"]]
    assert shown and all(output["output_type"] != "error" for output in shown)
