"""Training by keywords, for tests that vary one at a time: of the method, the Recipe and the run."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

from faststeer.extract.optimise import NTP, PO, BiPO, Recipe, RePS, Training, train

RUN = ("held_out", "checkpoint", "progress")


def trained(method: Any, model: Any, tokenizer: Any, pairs: Any, *, settings: Any = None, **keywords: Any) -> Training:
    run = {name: keywords.pop(name) for name in RUN if name in keywords}
    own = {field.name: keywords.pop(field.name) for field in fields(method) if field.name in keywords}
    return train(model, tokenizer, pairs, method(**own), Recipe(**keywords, **(settings or {})), **run)


ntp, po, reps, bipo = (partial(trained, method) for method in (NTP, PO, RePS, BiPO))
