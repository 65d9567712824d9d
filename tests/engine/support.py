"""A tokenizer whose text shows the tokens, plans that show mistakes of place, and the reference to compare with."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import nn

import faststeer as fs
from faststeer.engine import Completion, Engine


class Tokenizer:
    """Token 17 reads "<17>"; token 0 is special."""

    pad_token_id, eos_token_id, bos_token_id, chat_template = 0, None, None, None

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"<{i}>" for i in ids if i or not skip_special_tokens)

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2 + ord(c) % (models.VOCAB - 2) for c in text] for text in texts]}


LENGTHS = (7, 3, 5, 12, 4, 9, 1, 7)
LIMITS = [6, 9, 3, 8, 1, 7, 5, 6]


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [models.tokens(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]


def plan(name: str, seed: int = 0) -> fs.Plan:
    """Positions and gates of every kind: a token or a row taken for another shows."""
    d = [models.direction(100 * seed + i) for i in range(9)]
    latched = fs.Gate(d[7], 0.0, latched=True, layer=0, at="resid_pre")
    return fs.Plan(
        [
            fs.Add(d[0], 1.5, layers="all", positions="generated"),
            fs.Ablate(torch.stack(d[1:3]), layers="all", at=("resid_pre", "attn_out", "mlp_out")),
            fs.Clamp(d[3], low=2.0, layers=-1, positions="last"),
            fs.Add(d[4], -1.0, layers=0, at="mlp_out", positions="[-3:2]"),
            fs.Add(d[5], 2.0, layers=1, at="mlp_out", when=latched, keep_norm=True),
            fs.Add(d[6], 1.0, layers=0, positions="prompt", when=fs.Gate(d[8], kind="cosine", above=seed % 2 == 0)),
        ]
    )


def mixed(name: str) -> list[fs.Plan | None]:
    return [plan(name), None, plan(name, 1), plan(name, 2), None, plan(name), plan(name, 1), None]


def engine(model: nn.Module | str, **more: Any) -> Engine:
    given = models.model(model) if isinstance(model, str) else model
    return Engine(given, Tokenizer(), **({"max_batch": 3, "max_length": 32} | more))


def tokens(completions: Any) -> list[list[int]]:
    found: list[Completion] = list(completions)
    assert [c.index for c in found] == list(range(len(found)))
    return [c.token_ids for c in found]


def generated(model: nn.Module, prompt: list[int], steered: fs.Plan | None, new: int) -> list[int]:
    """What `generate` gives for a prompt alone, steered by hooks through the reference."""
    ids = torch.tensor([prompt])
    with fs.backend("reference"), fs.steer(model, steered or fs.Plan(), path="hooks"):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()
