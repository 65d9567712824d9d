"""Every setting of a search as a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from faststeer.behaviours.behaviour import Behaviour
from faststeer.behaviours.search.settings import STRENGTHS, SearchSettings
from faststeer.extract.contrast import Directions, contrast
from faststeer.extract.dim import Candidates
from faststeer.extract.sweep import EVERYWHERE
from faststeer.intervention import Ablate, Add, Clamp
from faststeer.plan import Plan

DEPTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of the plain settings that are tried first, in shares of the model's depth


class Space:
    """Every setting as a plan: the vectors of all methods, layers and tokens, found in one pass over the training
    prompts."""

    def __init__(self, model: Any, tokenizer: Any, behaviour: Behaviour, settings: SearchSettings) -> None:
        train, paired = behaviour.train, behaviour.paired
        sides = train.positive[: settings.train], train.negative[: settings.train]
        paired = paired and len(sides[0]) == len(sides[1])
        contrasts = contrast(
            model, tokenizer, *sides, positions=settings.positions, paired=paired, keep=settings.methods != ("dim",),
            batch_size=settings.batch,
        )  # fmt: skip
        self.means, self.goal = contrasts.candidates, settings.goal
        n_layers = self.means.n_layers
        self.layers = list(range(n_layers)) if settings.layers is None else list(settings.layers)
        self.positions, self.methods, self.ops = self.means.positions, settings.methods, settings.ops
        lengths = self.means.directions.norm(dim=-1) * self.means.exists()
        tables = {name: getattr(contrasts, name)() for name in settings.methods}
        self.tables: dict[str, Candidates | Directions] = {
            name: table.scaled_like(lengths) if isinstance(table, Directions) else table
            for name, table in tables.items()
        }

    def plain(self) -> list[dict[str, Any]]:
        """What a sweep over layers would try: the first method's vector at the last token, added once."""
        if "add" not in self.ops:
            return []
        near = {min(self.layers, key=lambda layer: abs(layer - d * self.means.n_layers)) for d in DEPTHS}
        base = {"position": max(self.positions), "method": self.methods[0], "op": "add", "strength_add": 1.0}
        return [{"layer": layer} | base for layer in sorted(near)]

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Ask Optuna for a setting."""
        layer = self.layers[trial.suggest_int("place", 0, len(self.layers) - 1)]
        position = trial.suggest_categorical("position", list(self.positions))
        method = trial.suggest_categorical("method", list(self.methods))
        op = trial.suggest_categorical("op", list(self.ops))
        strength = trial.suggest_float(f"strength_{op}", *STRENGTHS[op], log=True)
        return {"layer": layer, "position": position, "method": method, "op": op, "strength": strength}

    def parameters(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """A setting as Optuna names it."""
        names = ("position", "method", "op")
        rest = {"place": self.layers.index(setting["layer"]), f"strength_{setting['op']}": setting["strength"]}
        return {name: setting[name] for name in names} | rest

    def distributions(self, op: str) -> dict[str, Any]:
        """Where Optuna draws a setting of this op from."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        return {
            "place": IntDistribution(0, len(self.layers) - 1),
            "position": CategoricalDistribution(list(self.positions)),
            "method": CategoricalDistribution(list(self.methods)),
            "op": CategoricalDistribution(list(self.ops)),
            f"strength_{op}": FloatDistribution(*STRENGTHS[op], log=True),
        }

    def plan(self, setting: Mapping[str, Any]) -> Plan | None:
        """The plan of a setting; None where its method found no direction."""
        layer, position, op, strength = (setting[name] for name in ("layer", "position", "op", "strength"))
        table = self.tables[setting["method"]]
        index = self.positions.index(position)
        if not table.exists()[index, layer]:
            return None
        vector = table.vector(position, layer)
        more = self.goal == "more"
        if op == "add":
            return Plan([Add(vector, strength if more else -strength, layers=layer)])
        if op == "ablate":
            return Plan([Ablate(vector[layer], strength, layers="all", at=EVERYWHERE)])
        direction = table.directions[index, layer].double()
        unit = direction / direction.norm()
        low, high = (float(mean[index, layer] @ unit) for mean in (self.means.negative_mean, self.means.positive_mean))
        if more:
            return Plan([Clamp(vector, low=low + strength * (high - low), layers=layer)])
        return Plan([Clamp(vector, high=high - strength * (high - low), layers=layer)])
