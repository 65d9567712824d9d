"""Whether the Engine's passes over rows give what the model's own forward pass gives for each sequence alone: tried
when an Engine is made, so that an architecture it cannot run is refused, not run wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from faststeer.engine.batch import EngineBatch
from faststeer.engine.requests import Request
from faststeer.hf import Steering
from faststeer.hf.fused import WRONG_CALL

NO_MEMORY = "DefaultCPUAllocator"  # in the RuntimeError that PyTorch raises on a CPU
# Settings of a model whose value is a number of tokens from which on it computes otherwise.
EDGES = re.compile(r"window|chunk|original_max_position")


def vocabulary(model: Any) -> int:
    """How many tokens a model has embeddings for."""
    return model.get_input_embeddings().num_embeddings


@torch.inference_mode()
def check_logits(batch: EngineBatch, steering: Steering) -> None:
    """Sequences of different lengths, each read but for its last token, and that: short ones, and for every window and
    switch-over length that the config names and rows can reach, one that ends in front of it, one that crosses it and
    one behind it, together. `steering`: what passes run in, whatever the plans.

    Raises:
        ValueError: the logits are not the model's own; or the model cannot be called as the Engine calls it.
    """
    _check(batch, steering, [6, 3], "")
    config: Any = batch.model.config
    for edge in sorted(set(_edges(config.get_text_config().to_dict()))):
        if 2 <= edge <= batch.length - 1:
            remedy = f"make the Engine with max_length={edge}, or "
            sizes = [min(edge + 3, batch.length), 3, edge + 1]
            for first in range(0, len(sizes), batch.rows):
                _check(batch, steering, sizes[first : first + batch.rows], remedy)


def _edges(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _edges(value)
        elif EDGES.search(str(name)) and type(value) is int:
            yield value


def _check(batch: EngineBatch, steering: Steering, sizes: list[int], remedy: str) -> None:
    words, name = vocabulary(batch.model), type(batch.model).__name__
    ids = [[(7 * row + 3 * i + 1) % words for i in range(size)] for row, size in enumerate(sizes)]
    ids = [row[: batch.length] for row in ids[: batch.rows]]
    requests = [Request(row, prompt[:-1], None, None, 1, 0.0, 0, 1.0, 0) for row, prompt in enumerate(ids)]
    try:
        alone = [_alone(batch, row) for row in ids]
        with steering, batch.linears:
            batch.steering = steering
            logits = [batch.read_prompts(requests, 0)]
            batch.long[0, : len(ids)] = torch.tensor([prompt[-1] for prompt in ids], device=batch.device)
            logits.append(batch.read_tokens(len(ids), max(map(len, ids))))
    except torch.OutOfMemoryError:
        raise
    except WRONG_CALL as error:
        if NO_MEMORY in str(error):
            raise
        raise ValueError(f"{name} cannot be run by the Engine ({error}): use model.generate") from error
    finally:
        batch.steering = None
    expected = torch.stack([row[0, -2:] for row in alone], 1).float()
    # Of the row that is furthest away.
    away = ((torch.stack(logits).float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
    if not away <= (1e-3 if batch.dtype == torch.float32 else 0.1):
        what = f"with sequences of {', '.join(map(str, map(len, ids)))} tokens together, " if remedy else ""
        raise ValueError(
            f"{name}: {what}the Engine's logits are {away:.1%} away from the model's own, so that it cannot run this "
            f"architecture{' so far' if remedy else ''}: {remedy}use model.generate"
        )
    for row in range(len(ids)):
        batch.clear(row)


def _alone(batch: EngineBatch, ids: list[int]) -> Tensor:
    tokens = torch.tensor([ids], device=batch.device)
    return batch.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
