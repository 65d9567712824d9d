"""The training loop that all methods share: several vectors at once, each row of a batch under its own vector's plan.

The model's weights are never changed. A vector's batches, factors and starting point are drawn from its seed and the
step alone, and its gradient is clipped alone, so that a vector trained among others is the one trained by itself, and
a training that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faststeer import hf
from faststeer.artefacts import digest, fingerprint
from faststeer.evaluate.likelihood import ContinuationRow, score_rows
from faststeer.extract.optimise.checkpoint import TENSORS, Checkpoint, VectorState
from faststeer.extract.optimise.objectives import Objective, Side, TokenizedPair
from faststeer.extract.optimise.recipe import Course, Recipe
from faststeer.extract.optimise.rows import Plans, Work, losses, residual_sizes
from faststeer.extract.pairs import Pair, check_pairs, encode_completions
from faststeer.hf.batching import check_evaluating, model_device, model_name, padding_id
from faststeer.hf.changes import changing
from faststeer.hf.steering import steer
from faststeer.program import Capacity
from faststeer.progress import progress_bar
from faststeer.vector import SteeringVector

UNIT_PROMPTS = 64  # at most so many prompts tell the residual stream's size


class TrainingDiverged(ArithmeticError):
    """A loss or gradient became NaN or infinite.

    Attributes:
        step: the step at which it was found, counted from 1.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Run:
    """One trained vector.

    Args:
        layer, seed, coefficient: what it was trained with.
        vector: at its one layer, times coefficient x the mean factor: added with coefficient 1 it has the middle of the
            strengths that it was trained at. Raw scale, fp32; `provenance` has the method's settings and the losses.
        losses: of each step's batch, before the step.
        held_out: loss on the held-out pairs, by the number of steps taken.
        best_step: the steps after which `vector` was taken: those with the lowest held-out loss, or all.
    """

    layer: int
    seed: int
    coefficient: float
    vector: SteeringVector
    losses: tuple[float, ...]
    held_out: dict[int, float]
    best_step: int

    @property
    def loss(self) -> float:
        """The held-out loss at the best step, or without held-out pairs the last step's."""
        return self.held_out[self.best_step] if self.held_out else self.losses[-1]


@dataclass(frozen=True)
class Training:
    """All vectors of a training, in the order layers, seeds, coefficients."""

    method: str
    runs: tuple[Run, ...]

    def select(
        self, *, layer: int | None = None, seed: int | None = None, coefficient: float | None = None
    ) -> Training:
        """Return the runs with this layer, seed and coefficient. Raises ValueError if there is none."""
        asked = {"layer": layer, "seed": seed, "coefficient": coefficient}
        asked = {name: value for name, value in asked.items() if value is not None}
        runs = tuple(run for run in self.runs if all(getattr(run, name) == value for name, value in asked.items()))
        if not runs:
            there = [(run.layer, run.seed, run.coefficient) for run in self.runs]
            raise ValueError(f"no vector was trained with {asked}: there are (layer, seed, coefficient) {there}")
        return Training(self.method, runs)

    @property
    def best(self) -> Run:
        """The run with the lowest loss (on held-out pairs, where there are some)."""
        return min(self.runs, key=lambda run: run.loss)

    @property
    def vector(self) -> SteeringVector:
        """The vector trained; of several layers, one SteeringVector with all of them.

        Raises:
            ValueError: there are several for one layer: `select` a seed and a coefficient first.
        """
        if len(self.runs) == 1:
            return self.runs[0].vector
        directions = {run.layer: run.vector[run.layer] for run in self.runs}
        if len(directions) < len(self.runs):
            raise ValueError(
                "several vectors were trained for one layer: take .select(seed=..., coefficient=...).vector, or .best"
            )
        first = self.runs[0].vector
        provenance = {"layers": {str(run.layer): dict(run.vector.provenance) for run in self.runs}}
        return SteeringVector(
            directions, at=first.at, model=first.model, method=self.method, scale="raw", provenance=provenance
        )


def train(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    method: Objective,
    recipe: Recipe,
    *,
    held_out: Sequence[Pair] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Training:
    """Train a vector for every layer, seed and coefficient of a recipe by a method: `train(model, tokenizer, pairs,
    NTP(), Recipe(layers=14))`.

    Args:
        model: any causal language model that `steer` takes, in eval mode; its weights are left as they are. The vectors
            are fp32 whatever the model's dtype.
        pairs: with prompts, chosen completions and signs; for every method but `NTP` each with a rejected completion.
        method: `NTP`, `PO`, `RePS` or `BiPO`, which say their loss and their source; or an Objective of one's own.
        recipe: where, how long and how.
        held_out: pairs on which the loss is watched: the vector is that of the step at which it was lowest
            (`Recipe.every`, `Recipe.patience`); the factor is then the mean factor.
        checkpoint: file to keep the state in, every `Recipe.every` steps; if it exists, training goes on from there, to
            the same vector bit for bit on the same machine.
        progress: show a progress bar on stderr.

    Returns:
        A `Training`: `.vector`, `.runs` with losses, `.best`.

    Raises:
        ValueError: pairs, numbers, layers or a checkpoint that cannot be used; nothing was trained then.
        TrainingDiverged: a loss or gradient that is not finite, with the step; the last checkpoint is kept.
    """
    check_evaluating(model)
    pairs = check_pairs(pairs, rejected=method.needs_rejected)
    held_out = [] if held_out is None else check_pairs(held_out, "held_out", rejected=method.needs_rejected)
    _check_apart(pairs, held_out, recipe.patience)
    course = recipe.filled(method, hf.find_hook_points(model).n_layers, len(pairs))
    with changing() as changes:  # weights need no gradient inside, so that none is computed or kept for them
        for parameter in model.parameters():
            if parameter.requires_grad:
                changes.on_undo(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        return _Loop(model, tokenizer, course, pairs, held_out, checkpoint, progress).run()


@dataclass
class _Loop:
    model: Any
    tokenizer: Any
    course: Course
    pairs: list[Pair]
    held_out: list[Pair]
    checkpoint: str | os.PathLike[str] | None
    progress: bool
    states: list[VectorState] = field(init=False)
    plans: Plans = field(init=False)

    def run(self) -> Training:
        course, grid = self.course, self.course.grid
        self.description = self._description()
        self.path = None if self.checkpoint is None else Path(self.checkpoint)
        self.units = self._units()
        self.states, self.step = self._begin()
        self.saved = self.step
        for state in self.states:
            state.values.requires_grad_()
        self.plans = Plans([s.values for s in self.states], [g[0] for g in grid], course.at, course.positions)
        self.optimizer = self._make_optimizer()
        if self.step < course.steps and not all(state.done for state in self.states):
            used = course.used()
            encoded = self._encode([*(self.pairs[index] for index in used), *self.held_out])
            self.examples = dict(zip(used, encoded, strict=False))
            self.unseen = encoded[len(used) :]
            self._train()
        return Training(course.method.name, tuple(self._result(i) for i in range(len(grid))))

    def _begin(self) -> tuple[list[VectorState], int]:
        device = model_device(self.model)
        if self.path is not None and self.path.exists():
            states, step = Checkpoint.of(self.path, self.description, len(self.course.grid))
            for state in states:
                for name in TENSORS:
                    setattr(state, name, getattr(state, name).to(device))
            return states, step
        hidden = hf.find_hook_points(self.model).hidden_size
        starts = [
            self.units[layer] * self.course.drawn_start(layer, seed, hidden).to(device)
            for layer, seed, _ in self.course.grid
        ]
        return [VectorState(v, v.clone(), torch.zeros_like(v), torch.zeros_like(v)) for v in starts], 0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [state.values], "unit": self.units[layer]}
            for state, (layer, _, _) in zip(self.states, self.course.grid, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.course.weight_decay)
        for state in self.states:
            # The optimizer works on the state's own tensors, so that a checkpoint finds them there.
            optimizer.state[state.values] = {
                "step": torch.tensor(float(len(state.losses))),
                "exp_avg": state.first_moment,
                "exp_avg_sq": state.second_moment,
            }
        return optimizer

    def _units(self) -> dict[int, float]:
        """By layer, what a learning rate of 1 is."""
        course = self.course
        if course.unit == "absolute":
            return dict.fromkeys(course.layers, 1.0)
        prompts = [pair.prompt for pair in self.pairs[:UNIT_PROMPTS]]
        how: dict[str, Any] = {"system": course.system, "rendered": course.rendered}
        sizes = residual_sizes(self.model, self.tokenizer, prompts, course.layers, course.rows, **how)
        for layer, size in sizes.items():
            if not (math.isfinite(size) and size > 0):
                raise ValueError(
                    f"the residual stream after layer {layer} has size {size} on the training prompts: does the model "
                    "overflow? Load it in bfloat16 or float32"
                )
        return sizes

    def _encode(self, pairs: list[Pair]) -> list[TokenizedPair]:
        course = self.course
        how: dict[str, Any] = {name: getattr(course, name) for name in ("system", "rendered", "max_tokens")}
        chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected or "" for pair in pairs]
        prompts = [pair.prompt for pair in pairs]
        both = encode_completions(self.tokenizer, prompts, chosen, **how)
        if course.method.needs_rejected:
            both += encode_completions(self.tokenizer, prompts, rejected, **how)
        references = [math.nan] * len(both)
        if course.method.needs_reference:
            rows = [ContinuationRow(text.prompt, text.completion) for text in both]
            scored = score_rows(self.model, rows, pad_id=padding_id(self.tokenizer), batch_size=course.rows)
            references = [each.total for each in scored]
        sides = [Side(text, value) for text, value in zip(both, references, strict=True)]
        others: list[Any] = sides[len(pairs) :] or [None] * len(pairs)
        return [TokenizedPair(sides[i], others[i], pair.sign) for i, pair in enumerate(pairs)]

    def _train(self) -> None:
        course = self.course
        first = self.plans.of(0, course.middle)
        name = f"Training {len(self.states)} vector(s) by {course.method.name}"
        rows = max(2, course.rows)  # no pass has more plans than rows; a preference has two rows
        with (
            # By hooks: one site in a layer is steered, and fused norms compute again in the backward pass what the
            # model's own keep (1.5 times the CPU time of a step on the demo model).
            steer(
                self.model, [first], capacity=Capacity(slots=rows, vectors=rows, entries=1), path="hooks"
            ) as steering,
            progress_bar(name, course.steps - self.step, self.progress) as advance,
        ):
            passes: dict[str, Any] = {"pad_id": padding_id(self.tokenizer), "rows": course.rows}
            losses_of = partial(losses, self.model, steering, course.method, self.plans, **passes)
            while self.step < course.steps and not all(state.done for state in self.states):
                self._step(losses_of)
                self.step += 1
                if self.step % course.interval == 0 or self.step == course.steps:
                    self._evaluate(losses_of)
                    self._save()
                last = [state.losses[-1] for state in self.states]
                advance(f"{name}, loss {sum(last) / len(last):.4f}")

    def _step(self, losses_of: Callable[..., Tensor]) -> None:
        course, step = self.course, self.step
        work = [
            Work(number, term, 1 / course.batch_size)
            for number, (_, seed, coefficient) in enumerate(course.grid)
            if not self.states[number].done
            for pair, factor in zip(course.batch(seed, step), course.drawn_factors(seed, step), strict=True)
            for term in course.method.terms(self.examples[pair], coefficient * factor, course.drawn_sign(seed, step))
        ]
        loss = losses_of(work, backward=True).tolist()
        active = [(i, state) for i, state in enumerate(self.states) if not state.done]
        for number, state in active:
            gradient = state.values.grad
            if not math.isfinite(loss[number]):
                self._diverged(number, loss[number], "the loss")
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                self._diverged(number, loss[number], "a gradient")
        for number, state in active:
            if course.clip is not None:
                nn.utils.clip_grad_norm_([state.values], course.clip)
            state.losses.append(loss[number])
        for group in self.optimizer.param_groups:
            group["lr"] = group["unit"] * course.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for _, state in active:
            if not self.held_out:
                state.best_step, state.best = step + 1, state.values

    def _evaluate(self, losses_of: Callable[..., Tensor]) -> None:
        if not self.held_out:
            return
        course = self.course
        signs = (1, -1) if course.method.draws_sign else (1,)
        work = [
            Work(number, term, 1 / len(self.unseen) / len(signs))
            for number, (_, _, coefficient) in enumerate(course.grid)
            if not self.states[number].done
            for example in self.unseen
            for sign in signs
            for term in course.method.terms(example, coefficient * course.middle, sign)
        ]
        loss = losses_of(work).tolist()
        for number, state in enumerate(self.states):
            if state.done:
                continue
            if not math.isfinite(loss[number]):
                self._diverged(number, loss[number], "the held-out loss")
            if not state.held_out or loss[number] < min(state.held_out.values()):
                state.best_step, state.best = self.step, state.values.detach().clone()
            state.held_out[self.step] = loss[number]
            since = sum(at > state.best_step for at in state.held_out)
            state.done = course.patience is not None and since >= course.patience

    def _save(self) -> None:
        if self.path is not None:
            Checkpoint(self.states, self.step, self.description).save(self.path)
            self.saved = self.step

    def _diverged(self, number: int, loss: float, what: str) -> None:
        layer, seed, coefficient = self.course.grid[number]
        step = self.step + (what != "the held-out loss")
        kept = "no checkpoint was kept"
        if self.path is not None and self.path.exists():
            kept = f"the checkpoint of step {self.saved} is kept in {self.path}"
        raise TrainingDiverged(
            f"{what} of the vector of layer {layer}, seed {seed}, coefficient {coefficient} is not finite at step "
            f"{step} (loss {loss}); {kept}. Use a lower lr= or smaller factors=, or a model in bfloat16 or float32",
            step,
        )

    def _description(self) -> dict[str, Any]:
        course = self.course
        return course.describe() | {
            "layers": list(course.layers),
            "seeds": list(course.seed),
            "coefficients": list(course.coefficient),
            "model": model_name(self.model),
            "weights": fingerprint(self.model),
            "pairs": digest(list(map(asdict, self.pairs))),
            "held_out": digest(list(map(asdict, self.held_out))),
        }

    def _result(self, number: int) -> Run:
        (layer, seed, coefficient), state = self.course.grid[number], self.states[number]
        scale = coefficient * self.course.middle
        provenance = self.course.describe() | {
            "seed": seed,
            "coefficient": coefficient,
            "unit_size": self.units[layer],
            "scaled_by": scale,
            "best_step": state.best_step,
            "losses": state.losses,
            "held_out": {str(at): loss for at, loss in state.held_out.items()},
            "pairs_sha256": digest(list(map(asdict, self.pairs))),
        }
        vector = SteeringVector(
            {layer: (state.best.detach() * scale).cpu()},
            at=self.course.at,
            model=model_name(self.model),
            method=self.course.method.name,
            scale="raw",
            provenance=provenance,
        )
        return Run(layer, seed, coefficient, vector, tuple(state.losses), dict(state.held_out), state.best_step)


def _check_apart(pairs: list[Pair], held_out: list[Pair], patience: int | None) -> None:
    if patience is not None and not held_out:
        raise ValueError("patience needs held_out= pairs, on which it is seen whether the loss still falls")
    seen = {json.dumps(asdict(pair), sort_keys=True) for pair in pairs}
    both = [i for i, pair in enumerate(held_out) if json.dumps(asdict(pair), sort_keys=True) in seen]
    if both:
        raise ValueError(
            f"held_out[{both[0]}] is among the training pairs ({len(both)} in all are): hold out pairs that are not "
            "trained on"
        )
