"""Makes tests/formats/fixtures: files written by other projects' own code, and what that code says of them.

Run by hand where those projects are installed beside faststeer (repeng 0.4.0 wants numpy < 2 and scikit-learn,
steering-vectors 0.12.2 an older transformers than ours; their code runs with ours):

    pip install --no-deps --target other repeng==0.4.0 steering-vectors==0.12.2 numpy==1.26.4 scikit-learn joblib \
threadpoolctl
    PYTHONPATH=other python tests/formats/make_fixtures.py

- repeng.gguf: a ControlVector trained by repeng on the demo model and written by its `export_gguf`.
- repeng.safetensors: its `directions`, and the logits of its ControlModel under them (coefficient 1.5) for `ids`.
- steering_vectors.pt: `torch.save` of a SteeringVector of that project; steering_vectors.safetensors: its activations
  and the logits under its `apply`.
"""

from __future__ import annotations

from pathlib import Path

import steering_vectors
import torch
from repeng import ControlModel, ControlVector, DatasetEntry
from safetensors.torch import save_file

import faststeer as fs

HERE = Path(__file__).parent / "fixtures"
LAYERS = (1, 2)


def main() -> None:
    HERE.mkdir(exist_ok=True)
    model, tokenizer = fs.demo.load()
    harmful, harmless = fs.demo.prompts("refusal", "train")
    ids = tokenizer(harmless[0], return_tensors="pt").input_ids
    pairs = [DatasetEntry(a, b) for a, b in zip(harmful[:16], harmless[:16], strict=True)]

    vector = ControlVector.train(model, tokenizer, pairs, hidden_layers=LAYERS)
    vector.export_gguf(str(HERE / "repeng.gguf"))
    controlled = ControlModel(model, LAYERS)
    controlled.set_control(vector, 1.5)
    with torch.no_grad():
        logits = controlled(ids).logits
    controlled.unwrap()
    directions = {f"layers.{layer}": torch.from_numpy(d) for layer, d in vector.directions.items()}
    save_file(directions | {"ids": ids, "logits": logits}, HERE / "repeng.safetensors")

    generator = torch.Generator().manual_seed(0)
    activations = {layer: torch.randn(model.config.hidden_size, generator=generator) for layer in LAYERS}
    other = steering_vectors.SteeringVector(activations, "decoder_block")
    torch.save(other, HERE / "steering_vectors.pt")
    with torch.no_grad(), other.apply(model, multiplier=1.5):
        logits = model(ids).logits
    directions = {f"layers.{layer}": d for layer, d in activations.items()}
    save_file(directions | {"ids": ids, "logits": logits}, HERE / "steering_vectors.safetensors")


if __name__ == "__main__":
    main()
