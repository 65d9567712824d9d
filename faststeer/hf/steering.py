"""Steering a whole model: `with steer(model, plan)`, one plan for every row of the batch or one per row, changed while
the model runs.

The model's own code is untouched: hooks at the sites in use or fused layers, and a wrapper of `generate`, on the
instances. Leaving the context removes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from faststeer.hf.anatomy import find_hook_points
from faststeer.hf.attach import is_steered, register, watch_generate, watch_passes
from faststeer.hf.changes import Changes, Context, finish_undoing, is_changed
from faststeer.hf.checkpointing import follow_checkpoints
from faststeer.hf.fused import Fusion, find_fusion, patch
from faststeer.hf.hook_points import HookPoints, check_points, install, next_order
from faststeer.hf.known import known_of, structure
from faststeer.hf.passes import Passes
from faststeer.hf.probe_log import ProbeLog
from faststeer.hf.row_plans import RowPlans
from faststeer.intervention import Intervention
from faststeer.ops import Backend, backend_for
from faststeer.plan import Plan, Plans, distinct, n_sites, plans_for
from faststeer.program import Capacity
from faststeer.vector import HookPoint

__all__ = ["Part", "Path", "Steering", "is_steered", "steer"]

Path = Literal["auto", "fused", "hooks"]


class Part(Protocol):
    """What else acts while a steering is entered (`freeze`, `observe.ablate`).

    Attributes:
        copies: how often each row stands in a pass below the model's inputs; the last one is steered.
        alone: what to say where the model is steered by another one as well; "" if it may be.
    """

    copies: int
    alone: str

    def check(self, plan: Plan) -> None:
        """Raise ValueError for a plan that it cannot act beside."""

    def check_generate(self, model: Any, given: Mapping[str, Any]) -> None:
        """Raise ValueError for arguments of `generate` that it cannot act beside."""

    def enter(self, changes: Changes, steering: Steering) -> None:
        """Act, until the changes are undone."""


def steer(
    model: nn.Module,
    plans: Plans,
    *,
    hook_points: HookPoints | None = None,
    capacity: Capacity | None = None,
    path: Path | None = None,
) -> Steering:
    """Steer a whole model inside a `with` block.

        with steer(model, plan):                      # every row
            model.generate(**batch)
        with steer(model, [plan, None, other]):       # a plan per row of the batch; None: not steered
            model.generate(**batch)

    Works around `model(...)` and `model.generate(...)` with any cache, sampling or beams (a prompt's beams and return
    sequences share its plan), padding on either side, gradients on or off; and around `model.generate_batch(...)` and
    `model.init_continuous_batching(...)`, where a list has a plan per request, in the order in which they are added.
    Contexts nest: an outer one acts before an inner one. Everything is checked here, before the model is touched.

    Args:
        model: a causal language model of transformers (or its base model). Two short forward passes find and confirm
            its hook points, again when its modules change.
        plans: one for all rows, or a list with one per row of the batch.
        hook_points: the modules of an architecture that is not recognised.
        capacity: room for plans that will be assigned later, if the default (`Capacity.of`) is not enough.
        path: "fused" (residual add, steering and next norm in one op), "hooks", or "auto": fused if the architecture
            and its use allow it. Default: FASTSTEER_PATH, else "auto". Fused norms sum in another order than the
            model's own: a row without a plan equals the unpatched model to rounding, and the fused model without plans
            bit for bit. With hooks it equals both bit for bit.

    Raises:
        TypeError, ValueError: a plan that does not fit the model, an unknown architecture, capacity exceeded.
        RuntimeError: path="fused" is not possible; the message says why.
    """
    return Steering(model, plans, hook_points, capacity, path)


class Steering(Context["Steering"]):
    """What `steer` returns: enter it, change it while the model runs, read it.

    Attributes:
        model: that is steered.
        points: where its hook points are.
        passes: the pass under way and what acts at each site.
        part: what acts beside it.
        alone: what to say where the model is steered by another one as well; "" if it may be.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: Plans,
        hook_points: HookPoints | None = None,
        capacity: Capacity | None = None,
        path: Path | None = None,
        part: Part | None = None,
    ) -> None:
        finish_undoing()
        self.model, self.part, self._named, self._wanted = model, part, hook_points, _checked_path(path)
        self.alone = part.alone if part else ""
        known = known_of(model)
        self.points = find_hook_points(model, hook_points, known)
        fusion = find_fusion(model, self.points, known)
        self._fusion: Fusion | None = None if isinstance(fusion, str) else fusion
        self._no_fusion = fusion if isinstance(fusion, str) else ""
        self._structure = known.structure
        self._why, self._hooked, self._order, self._first = "", set[int](), 0, False
        if self._wanted == "fused" and self.path != "fused":
            raise RuntimeError(f"path='fused' was chosen, but the layers cannot be fused: {self.why}")
        listed = self._checked(plans)
        size, home = (self.points.n_layers, self.points.hidden_size), _device_of(self.points.layer(model, 0))
        self._plans, self._log = RowPlans(*listed, *size, capacity, home), ProbeLog(size[0])
        copies = 1 if part is None else part.copies
        self.passes = Passes(self._plans, self._log, size[0], copies, self.points.streams)

    @property
    def path(self) -> Path:
        """ "fused" or "hooks", see `steer`."""
        return "hooks" if self.why else "fused"

    @property
    def why(self) -> str:
        """Why by hooks; "" where fused."""
        return self._why if self.entered else self._why_hooks()

    @property
    def backend(self) -> Backend:
        """The back end of the op on the model's device: "cpu", "cuda", "triton" or "reference"."""
        return backend_for(self._plans.program.device)

    @property
    def capacity(self) -> Capacity:
        """Room for plans: slots, vectors and entries."""
        return self._plans.program.capacity

    @property
    def loaded(self) -> Sequence[Plan | None]:
        """The plan in each slot."""
        return self._plans.program.plans

    @property
    def unfinished(self) -> Collection[int]:
        """Slots whose `load` was interrupted: what they hold is not known, and passes are refused until it is said."""
        return self._plans.program.unfinished

    @property
    def tables(self) -> Sequence[Tensor]:
        """The tables that a captured graph reads: plans that change change them in place."""
        return self._plans.tables()

    @property
    def fingerprint(self) -> str:
        """What a compiled or captured graph of the model takes for constant: when it changes, make the graph anew.
        Plans that change within the sites and sizes in use leave it as it is."""
        return self.passes.signature

    def _why_hooks(self) -> str:
        if self._wanted == "hooks":
            return "path='hooks' was chosen"
        if self._no_fusion:
            return self._no_fusion
        layers = [self.points.layer(self.model, i) for i in range(self.points.n_layers)]
        if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            return "gradient checkpointing is on"
        if any("forward" in vars(layer) for layer in layers):
            return "the layers are patched already, by another steer(...) or by accelerate"
        if is_changed(self.points.owner(self.model)):
            return "inside another steer(...) or read(...), which acts by hooks"
        return ""

    def enter(self, changes: Changes) -> Steering:
        """Attach everything to the model; for `with`, which undoes it."""
        self._check_model()
        part, owner = self.part, self.points.owner(self.model)
        entry = register(changes, owner, self.alone)
        why, self._first = self._why_hooks(), not is_changed(owner)
        if self._wanted == "fused" and why:
            raise RuntimeError(f"path='fused' was chosen, but the layers cannot be fused: {why}")
        self._why, self._changes, self._hooked, self._order = why, changes, set(), next_order()
        changes.on_undo(self.passes.close)
        if part is not None:
            part.enter(changes, self)
        watch_passes(changes, self.model, self.points, self.passes, entry, self._ours)
        follow_checkpoints(changes, self.model, self.passes)
        if self._fusion is not None and not why:
            patch(changes, self.model, self.points, self._fusion, self.passes.add)
        self._install()
        watch_generate(changes, self.model, self.passes, entry, part.check_generate if part else lambda *_: None)
        changes.on_undo(self.passes.managers.stop)
        return self

    def _check_model(self) -> None:
        """Raise RuntimeError if the model's layers are others than when the steering was made."""
        if structure(self.model) == self._structure:
            return
        known = known_of(self.model)
        points = find_hook_points(self.model, self._named, known)
        fusion = find_fusion(self.model, points, known)
        if points != self.points or (fusion if isinstance(fusion, Fusion) else None) != self._fusion:
            raise RuntimeError(
                "the model's layers have changed since this steering was made: make another one, steer(model, ...)"
            )
        self._structure = known.structure

    def _ours(self, hook: Callable[..., None]) -> Callable[..., None]:
        hook.faststeer_order = self._order  # type: ignore[attr-defined]
        hook.faststeer_context = self  # type: ignore[attr-defined]  # lives as long as it is entered
        return hook

    def _install(self) -> None:
        """Hook the sites that a loaded plan uses and that have no hook yet. Fused sums have none; a branch's output is
        steered by a hook all the same, as other hooks on its module act before or after it by the order of the
        contexts."""
        program, passes = self._plans.program, self.passes
        forward = passes.steered_forward if self._first else None
        for site in range(n_sites(self.points.n_layers)):
            fused = not self._why and site % 2 == 0 and site > 0
            if program.depth[site] and not fused and site not in self._hooked:
                install(self._changes, self.model, self.points, {site: passes.steer(site)}, self._order, forward)
                self._hooked.add(site)  # afterwards: hooking twice does nothing
                passes.inside += self.points.places(self.model, site)
                self._changes.on_undo(passes.managers.stop)  # before hooks are removed: a pass may be under way
        sizes = f"{program.depth} {program.width} {program.columns} {program.latches}"
        passes.signature = f"{sorted(self._hooked)} {sizes}"

    # Changing plans

    def assign(self, plans: Plans) -> None:
        """Use other plans from the next forward pass on; also between two tokens of one generation. A list has one per
        row, as in `steer`.

        The tables keep their addresses; nothing is changed if a plan does not fit (ValueError).
        """
        listed = self._checked(plans)
        self.passes.managers.check_changeable()
        # A row's new plan has decided no latched gate yet; a row that keeps its plan keeps its decisions.
        self.passes.forget_gates(self._plans.assign(*listed))
        if self.entered:
            self._install()

    def load(self, slot: int, plan: Plan | None) -> None:
        """Put a plan into a slot, for `set_rows`; None empties it. Raises ValueError as `Program.change`."""
        self.change({slot: plan})

    def change(self, plans: Mapping[int, Plan | None]) -> None:
        """As `load`, for several slots: all of them or, with a ValueError, none."""
        for plan in distinct(plans.values()):
            self.check(plan)
        self.passes.managers.check_changeable()
        self._plans.change(plans)
        if self.entered:
            self._install()

    def _checked(self, plans: Plans) -> tuple[list[Plan | None], bool]:
        """The plans as a list, and whether it has one per row."""
        listed = plans_for(None, plans)
        for plan in distinct(listed):
            self.check(plan)
        if self.points.mixed and any(plan is not listed[0] for plan in listed):
            raise ValueError(
                f"{type(self.model).__name__} computes a row from the other rows of its batch as well (it quantises "
                "over the whole batch, say), so that a plan would act on rows that do not have it: give one plan for "
                "all rows, or run rows with different plans one after another"
            )
        return listed, not isinstance(plans, (Plan, Intervention))

    def check(self, plan: Plan) -> None:
        """Raise ValueError if the plan names a hook point that the model does not have."""
        if not self.points.uniform or self.points.resid_mid is None:
            check_points(self.model, self.points, plan)
        if self.part is not None:
            self.part.check(plan)

    # Where rows stand

    def set_prompt(self, columns: int | Sequence[int] | None) -> None:
        """Say where prompts end, for a loop of one's own over chunks, without cache, over a prompt with a known answer,
        or with a cache that was filled elsewhere.

        Args:
            columns: the number of columns that belong to the prompt, padding on the left included: one for all rows, or
                one per row. None: go back to taking a forward pass with an empty cache for a prompt.

        Raises:
            ValueError: no whole numbers from 0 on.
        """
        self.passes.streams.set(columns)

    def set_rows(self, rows: Tensor | None, n_sequences: int = 0) -> None:
        """Say where every token of the next forward passes stands, for a loop that keeps its own account: nothing is
        derived from a pass's inputs then, so that plans, positions and sequences change by `copy_` alone.

        Args:
            rows: `[3, batch x length]` int32, on the device of the first layer: each token's slot (-1: not steered),
                position counted from its prompt's end, and sequence; None: derive them again.
            n_sequences: of how many sequences latched gates' decisions are kept.
        """
        self.passes.give(rows, n_sequences)

    def forget(self, sequence: int) -> None:
        """A sequence starts anew: it has decided no latched gate."""
        self.passes.forget(sequence)

    # What probes saw

    @property
    def projections(self) -> dict[tuple[HookPoint, int], Tensor]:
        """What probes saw: `{(hook point, layer): [batch, tokens, k]}`, fp32, every token since the last
        `clear_projections`, in the order of the passes.

        `resid_post` of layer l is listed as `resid_pre` of layer l + 1, except for the last layer. Passes of different
        batch sizes cannot be put together: clear between them (ValueError).
        """
        return self._log.all()

    def seen(self, site: int) -> Tensor:
        """`[batch, tokens, k]`: what probes saw at a site (a number, as `plan.site` gives it) in the last pass."""
        return self._log.last(site)

    def clear_projections(self) -> None:
        """Forget what probes have seen."""
        self._log.clear()


def _checked_path(path: str | None) -> Path:
    source = "path" if path else "FASTSTEER_PATH"
    wanted = path or os.environ.get("FASTSTEER_PATH", "auto")
    if wanted not in ("auto", "fused", "hooks"):
        raise ValueError(f"{source} is {wanted!r}: expected auto, fused or hooks")
    return wanted  # type: ignore[return-value]


def _device_of(module: nn.Module) -> torch.device:
    """Of the first parameter. The CPU for offloaded ones: each tensor's own device is met when it comes."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
