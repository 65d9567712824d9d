"""What modules above offer to those below is there in a new process, whatever is imported first."""

import subprocess
import sys

import pytest
import torch

import faststeer as fs


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["v.safetensors", "v.gguf", "v.pt"])
def test_files_of_every_format_are_read_by_the_vectors_own_module(name, tmp_path):
    """And bring no transformers with them."""
    direction = torch.arange(1.0, 5.0)
    if name == "v.pt":
        torch.save(direction, tmp_path / name)
    else:
        fs.formats.save(fs.SteeringVector({3: direction}), tmp_path / name)
    said = {"at": "resid_post", "layer": 3} if name == "v.pt" else {}
    code = f"""
import sys
from faststeer.vector import SteeringVector
vector = SteeringVector.load(sys.argv[1], **{said})
print(vector.layers, vector[3].tolist(), "transformers" in sys.modules)
"""
    assert run(code, tmp_path / name) == "(3,) [1.0, 2.0, 3.0, 4.0] False"


@pytest.mark.parametrize(
    "looked_up",
    [
        "from faststeer.evaluate.judging import make; make('demo-tone')",
        "from faststeer.evaluate.judging import check_name; check_name('demo-coherent')",
        "from faststeer.evaluate.judging import make; make('demo')",
        "from faststeer.evaluate.judging import make; make({'judge': 'demo-coherent'})",
        "from faststeer.evaluate.sweep import load_sweep; load_sweep(sys.argv[1])",
    ],
)
def test_what_the_demo_adds_is_known_as_the_error_says(looked_up, tmp_path):
    fs.SteeringVector({1: torch.ones(4)}).save(tmp_path / "v.safetensors")
    path = tmp_path / "s.yaml"
    path.write_text("vectors: {v: v.safetensors}\nprompts: {demo: questions, limit: 2}\n")
    code = f"""
import sys
try:
    {looked_up}
except ValueError as error:
    (remedy,) = [part for part in str(error).split("`") if part.startswith("import ")]
    exec(remedy)
    {looked_up}
    print("known")
"""
    assert run(code, path) == "known"
