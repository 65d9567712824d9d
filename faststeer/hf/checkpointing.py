"""Gradient checkpointing: the backward pass runs the inside of a layer again, maybe after other forward passes, and it
must be steered as it was the first time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from faststeer.hf.changes import Changes
from faststeer.hf.passes import Passes


def follow_checkpoints(changes: Changes, model: nn.Module, passes: Passes) -> None:
    """Run again within the pass that it belongs to whatever the model checkpoints."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")  # as transformers calls it
        if checkpoint is not None:
            changes.replace(module, "_gradient_checkpointing_func", _following(checkpoint, passes))


def _following(checkpoint: Callable[..., Any], passes: Passes) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now, first = passes.now, True
        if now is None:
            return checkpoint(function, *args, **kwargs)

        def within(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            # What is being trained is read inside, both times; what probes see is kept the first time.
            with passes.resumed(dataclasses.replace(now, logged=first and now.logged)):
                first = False
                return function(*args, **kwargs)

        return checkpoint(within, *args, **kwargs)

    return run
