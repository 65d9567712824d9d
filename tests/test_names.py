"""One word, one thing: no two classes of the package have the same name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_class_has_a_name_of_its_own():
    places = defaultdict(list)
    for path in sorted([*(ROOT / "faststeer").rglob("*.py"), *(ROOT / "kernels" / "triton").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.resolve().relative_to(ROOT)}:{node.lineno}")
    twice = {name: sorted(set(found)) for name, found in places.items() if len(set(found)) > 1}
    assert len(places) > 100
    assert not twice, "a name says what its class is, and no other"
