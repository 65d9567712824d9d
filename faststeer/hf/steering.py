"""Steering a whole model: `with steer(model, plan)`, one plan for every row of the batch or one per row, changed while
the model runs.

The model's own code is untouched: hooks at the sites in use, and a wrapper around `generate` (on the instance) that
notes where the prompt ends. Leaving the context removes both.
"""

from __future__ import annotations

import functools
import inspect
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from faststeer.hf.cache import cache_in
from faststeer.hf.changes import Changes, Context, changing, finish_undoing
from faststeer.hf.fused import Fusion, NormForm, find_fusion, patch
from faststeer.hf.hook_points import (
    HookPoints,
    find_hook_points,
    first_tensor,
    install,
    is_held,
    next_order,
    no_resid_mid,
    own_forward,
)
from faststeer.hf.positions import Prompts
from faststeer.intervention import Intervention
from faststeer.ops import Backend, Rows, Tables, add_steer, add_steer_rmsnorm, backend_for, latch_
from faststeer.ops import steer as steer_rows
from faststeer.plan import Plan, n_sites, site_name
from faststeer.plan import hook_points as points_of
from faststeer.program import Capacity, Program
from faststeer.vector import HookPoint

Path = Literal["auto", "fused", "hooks"]
Plans = Plan | Intervention | Sequence[Plan | Intervention | None]

MAX_RECORDED = 4096  # layers of forward passes whose backward pass may still come

_active: weakref.WeakKeyDictionary[nn.Module, list[Steering]] = weakref.WeakKeyDictionary()


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
        with steer(model, [plan, None, other]):       # a plan per row of the batch; None: as if not steered
            model.generate(**batch)

    Works around `model(...)` and `model.generate(...)` with any cache, sampling or beams (a prompt's beams and return
    sequences share its plan), padding on either side, gradients on or off. Contexts nest: an outer one acts before an
    inner one. Everything is checked here, before the model is touched.

    Args:
        model: a causal language model of transformers (or its base model), whose hook points are found and confirmed by
            two forward passes over four tokens, once per model.
        plans: one for all rows, or a list with one per row of the batch.
        hook_points: where to find them in an architecture that is not recognised.
        capacity: room for plans that will be assigned later, where more is needed than the default (`Capacity.of`).
        path: "fused" (residual add, steering and next norm in one op), "hooks", or "auto": fused where the architecture
            and what is done with it allow. Default: FASTSTEER_PATH, else "auto". Fused norms sum in another order than
            the model's own, so that a row without a plan equals the unpatched model to rounding, and the fused model
            without plans bit for bit; by hooks, both bit for bit.

    Raises:
        TypeError, ValueError: a plan that does not fit the model, unknown architecture, capacity exceeded.
        RuntimeError: path="fused" where that cannot be; the message says why.
    """
    return Steering(model, plans, hook_points, capacity, path)


class Steering(Context["Steering"]):
    """What `steer` returns: enter it, change it while the model runs, read it.

    Attributes:
        path: "fused" or "hooks", see `steer`.
        why: why by hooks; "" where fused.
        backend: the back end of the op on the model's device: "cpu", "cuda", "triton" or "reference".
        projections: what probes saw, see there.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: Plans,
        hook_points: HookPoints | None = None,
        capacity: Capacity | None = None,
        path: Path | None = None,
    ) -> None:
        finish_undoing()
        self.model, self._wanted = model, _checked_path(path)
        self._plans, per_row = _as_plans(plans)
        self._points = find_hook_points(model, hook_points)
        size = self._points.n_layers, self._points.hidden_size
        self._capacity = capacity or Capacity.of(_distinct(self._plans), *size)
        home = _device_of(self._points.layer(model, 0))
        self._programs: dict[torch.device, Program] = {home: Program(*size, self._capacity, home)}
        self._slot_table: dict[torch.device, Tensor] = {}  # per device [plans], the slot of each plan in the list
        self._why = ""
        found = find_fusion(model, self._points)
        self._fusion: Fusion | None = found if isinstance(found, Fusion) else None
        self._no_fusion = "" if isinstance(found, Fusion) else found
        if self._wanted == "fused" and self.path != "fused":
            raise RuntimeError(f"path='fused' was chosen, but the layers cannot be fused: {self.why}")
        self._steers: dict[int, Callable[[Tensor], Tensor]] = {}  # by site
        self._hooked: set[int] = set()
        self._traced = ""  # what a compiled graph takes for constant
        self._owner_arguments = list(inspect.signature(self._points.owner(model).forward).parameters)
        self._pass: Pass | None = None  # what the layer under way belongs to
        self._whole_pass: Pass | None = None
        self._recorded: OrderedDict[tuple[int, int], _Recorded] = OrderedDict()  # (layer, address of its input)
        self._first_reader: dict[int, str] = {}
        self._prompts = Prompts()
        self._gate_state: Tensor | None = None  # [gates, batch]
        self._rows: Rows | None = None  # what set_rows was given
        self._history: dict[int, list[Tensor]] = {}
        self._load(self._plans, per_row)

    @property
    def path(self) -> Path:
        return "hooks" if self.why else "fused"

    @property
    def why(self) -> str:
        return self._why if self.entered else self._why_hooks()

    @property
    def backend(self) -> Backend:
        return backend_for(next(iter(self._programs)))

    @property
    def capacity(self) -> Capacity:
        """Room for plans: slots, vectors and entries."""
        return self._capacity

    @property
    def loaded(self) -> Sequence[Plan | None]:
        """The plan in each slot."""
        return next(iter(self._programs.values())).plans

    @property
    def fingerprint(self) -> str:
        """What a compiled or captured graph of the model takes for constant: when it changes, make the graph anew.
        Plans that change within the sites and sizes in use leave it as it is."""
        return self._traced

    def _why_hooks(self) -> str:
        if self._wanted == "hooks":
            return "path='hooks' was chosen"
        if self._no_fusion:
            return self._no_fusion
        layers = [self._points.layer(self.model, i) for i in range(self._points.n_layers)]
        if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            return "gradient checkpointing is on"
        if any("forward" in layer.__dict__ for layer in layers):
            return "the layers are patched already, by another steer(...) or by accelerate"
        if is_held(self._points.owner(self.model)):
            return "inside another steer(...) or read(...), which acts by hooks"
        return ""

    # Entering and leaving

    def _enter(self, changes: Changes) -> Steering:
        why = self._why_hooks()
        if self._wanted == "fused" and why:
            raise RuntimeError(f"path='fused' was chosen, but the layers cannot be fused: {why}")
        self._why, self._changes, self._hooked, self._order = why, changes, set(), next_order()

        def begin(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not changes.live:  # leaving was interrupted more than once: this hook would have been the last to go
                changes.undo()
            # Read and compared, so that a compiled graph is made anew when it changes: torch.compile does not look
            # whether a module that had no hooks has some now.
            elif self._traced:
                self._begin(owner, args, kwargs)

        owner = self._points.owner(self.model)
        changes.hook(owner.register_forward_pre_hook, self._ours(begin), with_kwargs=True)
        own_forward(changes, owner)
        changes.on_undo(self._end_passes)
        if self._fusion is not None and not why:
            patch(changes, self.model, self._points, self._fusion, self.add_at)
        self._install()
        _watch_generate(changes, self.model, self)
        return self

    def _end_passes(self) -> None:
        self._pass = self._whole_pass = None
        self._recorded.clear()
        self._prompts.end_generation()

    # Changing plans

    def assign(self, plans: Plans) -> None:
        """Use other plans from the next forward pass on; also between two tokens of one generation. A list has one per
        row, as in `steer`.

        The tables keep their addresses; nothing is changed if a plan does not fit (ValueError).
        """
        listed, per_row = _as_plans(plans)
        before = self._plans if self._per_row == per_row and len(self._plans) == len(listed) else None
        self._load(listed, per_row)
        self._forget_decisions(before)
        if self.entered:
            self._install()

    def _forget_decisions(self, before: list[Plan | None] | None) -> None:
        """A row's new plan has decided no latched gate yet; a row that keeps its plan keeps its decisions."""
        state = self._gate_state
        if state is None:
            return
        if before is None or state.shape[1] % len(before):
            state.zero_()
            return
        kept = [old is new for old, new in zip(before, self._plans, strict=True)]
        state &= torch.tensor(kept, device=state.device).repeat_interleave(state.shape[1] // len(kept))

    def _load(self, plans: list[Plan | None], per_row: bool) -> None:
        wanted = _distinct(plans)
        for plan in wanted:
            self.check(plan)
        found: list[int] = []
        for program in self._programs.values():
            found = program.load_all(wanted)  # equal programs: the first refuses what does not fit, before any changes
        slot_of = {id(plan): slot for plan, slot in zip(wanted, found, strict=True)}
        slots = [-1 if plan is None else slot_of[id(plan)] for plan in plans]
        if not self._slot_table or len(slots) != len(self._plans):
            self._slot_table = {
                device: torch.tensor(slots, dtype=torch.int32, device=device) for device in self._programs
            }
        else:
            for table in self._slot_table.values():
                table.copy_(torch.tensor(slots, dtype=torch.int32))
        self._plans, self._per_row = plans, per_row
        if per_row and self._gate_state is None:
            self._make_gate_state(len(plans), next(iter(self._programs)))

    def check(self, plan: Plan) -> None:
        """Raise ValueError if the plan names a hook point that the model does not have."""
        if self._points.resid_mid is None and any("resid_mid" in points_of(intervention) for intervention in plan):
            raise ValueError(no_resid_mid(self.model))

    def _install(self) -> None:
        """Hook the sites that a loaded plan uses and that have no hook yet."""
        program = next(iter(self._programs.values()))
        for number in range(n_sites(self._points.n_layers)):
            if not program.depth[number] or number in self._hooked or self._is_fused(number):
                continue
            layer = _running_layer(number)
            if self._why and layer not in map(_running_layer, self._hooked):
                self._follow(layer)
            steer = self._steers.setdefault(number, functools.partial(self.at, number))
            install(self._changes, self.model, self._points, {number: steer}, self._order)
            self._hooked.add(number)  # afterwards: hooking twice does nothing
        self._traced = f"{sorted(self._hooked)} {program.depth} {program.width} {program.columns} {program.latches}"

    def _is_fused(self, number: int) -> bool:
        """Whether a site is one of the fused sums. What enters the first layer is none; a branch's output is steered by
        a hook all the same, as other hooks on its module act before or after it by the order of the contexts."""
        return not self._why and number % 2 == 0 and number > 0

    def _follow(self, number: int) -> None:
        """Know when a layer, and what is inside it, begins."""
        layer = self._points.layer(self.model, number)
        hooks = [(layer, self._layer_begins(number))]
        hooks += [(child, self._inside_begins(number, name)) for name, child in layer.named_children()]
        for module, hook in hooks:
            self._changes.hook(module.register_forward_pre_hook, hook, prepend=True, with_kwargs=True)

    # Where rows stand

    def set_prompt(self, columns: int | Sequence[int] | None) -> None:
        """Say where prompts end, for a loop of one's own over chunks, without cache, or over a prompt with a known
        answer.

        Args:
            columns: the number of columns that belong to the prompt, padding on the left included: one for all rows, or
                one per row. None: go back to taking a forward pass with an empty cache for a prompt.
        """
        self._prompts.set(columns)
        self._forget_decisions(None)

    def set_rows(self, rows: Rows | None, n_sequences: int = 0) -> None:
        """Say where every token of the next forward passes stands, for a loop that keeps its own account: nothing is
        derived from a pass's inputs then, so that plans, positions and sequences change by `copy_` alone.

        Args:
            rows: of `batch x length` tokens, on the device of the first layer; None: derive them again.
            n_sequences: of how many sequences (numbers in `rows.sequence`) latched gates' decisions are kept.
        """
        self._rows = rows
        if rows is not None and (self._gate_state is None or self._gate_state.shape[1] != n_sequences):
            self._gate_state = self._closed_gates(n_sequences, rows.slot.device)

    def load(self, slot: int, plan: Plan | None) -> None:
        """Put a plan into a slot, for `set_rows`; None empties it.

        Raises:
            ValueError: as `Program.load`; nothing is changed then.
        """
        if plan is not None:
            self.check(plan)
        for program in self._programs.values():
            program.load(slot, plan)
        if self.entered:
            self._install()

    def forget(self, sequence: int) -> None:
        """A sequence starts anew: it has decided no latched gate."""
        if self._gate_state is not None:
            self._gate_state[:, sequence] = False

    def _begin(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: derive each row's slot and position from the pass's own inputs, on the device."""
        inputs = {**dict(zip(self._owner_arguments, args, strict=False)), **kwargs}
        tokens: Tensor = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        (batch, length), device = tokens.shape[:2], tokens.device
        if self._rows is not None:
            self._whole_pass = self._pass = self._given_pass(self._rows, batch, length)
            return
        cache = cache_in(inputs)
        past = cache.get_seq_length() if cache is not None else 0
        slots = self._row_slots(batch, device)
        position = self._prompts.positions(inputs.get("attention_mask"), past, batch, length, device)
        sequence = torch.arange(batch, dtype=torch.int32, device=device)
        if self._gate_state is None or self._gate_state.shape[1] != batch:
            self._make_gate_state(batch, device)
        rows = Rows(slots.repeat_interleave(length), position.reshape(-1), sequence.repeat_interleave(length))
        self._whole_pass = self._pass = Pass(rows, batch, length)

    def _given_pass(self, rows: Rows, batch: int, length: int) -> Pass:
        if rows.slot.shape[0] != batch * length:
            raise RuntimeError(
                f"set_rows was given {rows.slot.shape[0]} rows, but the forward pass has {batch} x {length} tokens"
            )
        return Pass(rows, batch, length)

    def _make_gate_state(self, batch: int, device: torch.device) -> None:
        if self._program_on(device).latching:
            self._gate_state = self._closed_gates(batch, device)

    def _closed_gates(self, sequences: int, device: torch.device) -> Tensor:
        return torch.zeros(self._capacity.entries, sequences, dtype=torch.bool, device=device)

    def _row_slots(self, batch: int, device: torch.device) -> Tensor:
        """`[batch]`: the slot of each row. Beams and return sequences of a prompt stand side by side and share its
        plan."""
        if device not in self._slot_table:
            self._slot_table[device] = next(iter(self._slot_table.values())).to(device)
        table = self._slot_table[device]
        if not self._per_row:
            return table.expand(batch)
        if self._prompts.generating and batch % len(table) == 0:
            return table.repeat_interleave(batch // len(table))
        self._check_batch(batch)
        return table

    def _check_batch(self, batch: int) -> None:
        if self._per_row and batch != len(self._plans):
            raise ValueError(
                f"the batch has {batch} rows, but there are {len(self._plans)} plans: give one plan per row, in "
                "order, or a single plan for all rows"
            )

    def _generation_begins(self, arguments: dict[str, Any]) -> None:
        tokens = self._prompts.begin_generation(arguments)
        self._forget_decisions(None)
        if tokens is not None:
            self._check_batch(tokens.shape[0])

    # Gradient checkpointing runs the inside of a layer again in the backward pass, maybe after other forward passes.
    # Which pass it belongs to shows in the address of the layer's input, which the checkpoint keeps alive until then.

    def _layer_begins(self, number: int) -> Callable[..., None]:
        """A pre-hook for layer `number`."""

        def begin(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _in_backward():
                self._run_again(number, first_tensor(args, kwargs))
            else:
                self._pass = self._whole_pass

        return self._ours(begin)

    def _inside_begins(self, number: int, name: str) -> Callable[..., None]:
        """A pre-hook for a child of layer `number`: the first one that reads the layer's input is where the inside of a
        checkpoint begins."""

        def begin(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer = self._points.layer(self.model, number)
            if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
                return
            x = first_tensor(args, kwargs)
            if _in_backward():
                if self._first_reader.get(number) == name:
                    self._run_again(number, x)
            elif self._pass is not None and self._pass is self._whole_pass:
                self._first_reader[number] = name
                self._record(number, x, self._pass)
                # What is being trained is read inside the checkpoint, now as when it runs again.
                self._pass = self._pass.copy()

        return self._ours(begin)

    def _record(self, number: int, x: Tensor, now: Pass) -> None:
        if not (torch.is_grad_enabled() or x.requires_grad):
            return
        before = self._recorded.pop((number, x.data_ptr()), None)
        also = before is not None and before.pending and before.tensor() is not None and before.now is not now
        self._recorded[number, x.data_ptr()] = _Recorded(now, weakref.ref(x), ambiguous=also)
        while len(self._recorded) > MAX_RECORDED:
            self._recorded.popitem(last=False)

    def _run_again(self, number: int, x: Tensor) -> None:
        found = self._recorded.get((number, x.data_ptr()))
        if found is None:
            raise RuntimeError(
                f"gradient checkpointing runs layer {number} again, but its forward pass was not steered, or too many "
                "forward passes came since: call backward inside the same steer(...) context, after each pass"
            )
        if found.ambiguous:
            raise RuntimeError(
                f"gradient checkpointing runs layer {number} again, but two forward passes gave it the same tensor: "
                "call backward after each pass, or give each pass its own tensor (embeddings.clone())"
            )
        found.pending = False
        self._pass = found.now.copy()

    def _ours(self, hook: Callable[..., None]) -> Callable[..., None]:
        hook.faststeer_order = self._order  # type: ignore[attr-defined]
        return hook

    # Acting

    def _program_on(self, device: torch.device) -> Program:
        if device not in self._programs:
            self._programs[device] = next(iter(self._programs.values())).to(device)
        return self._programs[device]

    # For a loop of one's own over layers that were fused: `begin_tokens`, then every site in order.

    @property
    def hooked(self) -> Collection[int]:
        """The sites (numbers, as `plan.site` gives them) at which hooks steer, while entered."""
        return self._hooked

    def begin_tokens(self, batch: int, length: int) -> None:
        """A pass over the `batch x length` tokens of which `set_rows` was given the rows."""
        if self._rows is None:
            raise RuntimeError("begin_tokens is for passes whose rows were given by set_rows")
        self._whole_pass = self._pass = self._given_pass(self._rows, batch, length)

    def at(self, number: int, x: Tensor) -> Tensor:
        """x, steered at a site."""
        now, given = self._given(number, x)
        if given.latches:
            latch_(given.flat, given.tables, given.rows, given.latched)
        steered = steer_rows(given.flat, given.tables, given.rows, given.state, given.probe)
        self._keep(number, given.probe, now)
        return steered.view_as(x)

    def add_at(
        self, number: int, branch: Tensor, residual: Tensor, norm: tuple[Tensor, NormForm] | None
    ) -> tuple[Tensor, Tensor | None]:
        """`fused.Add`."""
        if branch.dtype != residual.dtype or branch.device != residual.device:  # under autocast, say
            return self.at(number, residual + branch), None
        now, given = self._given(number, branch)
        other = residual.reshape_as(given.flat)
        if given.latches:
            latch_(given.flat, given.tables, given.rows, given.latched, residual=other)
        arguments = given.tables, given.rows, given.state, given.probe
        normed = None
        if norm is None:
            hidden = add_steer(given.flat, other, *arguments)
        else:
            weight, form = norm
            how = weight, form.eps, form.weight_offset, form.fp32_weight
            normed, hidden = add_steer_rmsnorm(given.flat, other, *how, *arguments)
            normed = normed.view_as(branch)
        self._keep(number, given.probe, now)
        return hidden.view_as(branch), normed

    def _given(self, number: int, x: Tensor) -> tuple[Pass, _Given]:
        """What an op is given at a site."""
        # A layer's own input and output lie outside its checkpoint.
        now = self._whole_pass if number % 4 == 0 and not _in_backward() else self._pass
        if now is None:
            raise RuntimeError(
                "a decoder layer was called outside the model's forward pass, which says where each row stands: "
                "use faststeer.hook(...) on single modules"
            )
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] != now.batch * now.length:
            at, layer = site_name(number, self._points.n_layers)
            raise RuntimeError(
                f"{at} of layer {layer} has {flat.shape[0]} rows in a forward pass of {now.batch} x {now.length} "
                "tokens: this model cannot be steered there"
            )
        program = self._program_on(x.device)
        tables = program.tables(number)
        if program.requires_grad:
            bank, scalars = now.live_on(x.device, program)
            tables = tables._replace(bank=bank, scalars=scalars)
        if self._gate_state is not None and self._gate_state.device != x.device:
            self._gate_state = self._gate_state.to(x.device)
        latches = self._gate_state is not None and program.latches[number]
        probe = None
        if program.columns[number]:
            probe = torch.zeros(flat.shape[0], program.columns[number], dtype=torch.float32, device=x.device)
        return now, _Given(flat, tables, now.rows_on(x.device), self._gate_state, probe, latches)

    def _keep(self, number: int, probe: Tensor | None, now: Pass) -> None:
        if probe is not None and not _in_backward():
            self._history.setdefault(number, []).append(probe.view(now.batch, now.length, -1))

    @property
    def projections(self) -> dict[tuple[HookPoint, int], Tensor]:
        """What probes saw: `{(hook point, layer): [batch, tokens, k]}`, fp32, every token since the last
        `clear_projections`, in the order of the passes.

        `resid_post` of layer l is listed as `resid_pre` of layer l + 1, except for the last layer. Passes of different
        batch sizes cannot be put together: clear between them (ValueError).
        """
        found = {}
        for number, pieces in sorted(self._history.items()):
            if len({piece.shape[0] for piece in pieces}) > 1:
                raise ValueError(
                    "forward passes with different batch sizes were probed: call clear_projections() between them"
                )
            width = max(piece.shape[2] for piece in pieces)
            padded = [torch.nn.functional.pad(piece, (0, width - piece.shape[2])) for piece in pieces]
            found[site_name(number, self._points.n_layers)] = torch.cat(padded, dim=1)
        return found

    def seen(self, site: int) -> Tensor:
        """`[batch, tokens, k]`: what probes saw at a site (a number, as `plan.site` gives it) in the last pass."""
        return self._history[site][-1]

    def clear_projections(self) -> None:
        """Forget what probes have seen."""
        self._history.clear()


class _Given(NamedTuple):
    """The arguments of an op at a site, and whether latched gates are decided there."""

    flat: Tensor
    tables: Tables
    rows: Rows
    state: Tensor | None
    probe: Tensor | None
    latches: bool

    @property
    def latched(self) -> Tensor:
        assert self.state is not None
        return self.state


class Pass:
    """What is known of the forward pass under way."""

    def __init__(self, rows: Rows, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self._rows = {rows.slot.device: rows}
        self._live: dict[tuple[torch.device, bool], tuple[Tensor, Tensor]] = {}

    def rows_on(self, device: torch.device) -> Rows:
        if device not in self._rows:
            self._rows[device] = Rows(*(t.to(device) for t in next(iter(self._rows.values()))))
        return self._rows[device]

    def copy(self) -> Pass:
        """The same pass, with nothing read of what is being trained."""
        other = Pass(next(iter(self._rows.values())), self.batch, self.length)
        other._rows = self._rows
        return other

    def live_on(self, device: torch.device, program: Program) -> tuple[Tensor, Tensor]:
        """What is being trained, read once per pass."""
        key = device, torch.is_grad_enabled()  # a reentrant checkpoint's forward pass has gradients off
        if key not in self._live:
            self._live[key] = program.live()
        return self._live[key]


@dataclass
class _Recorded:
    """The pass in which a checkpointed layer saw a tensor."""

    now: Pass
    tensor: weakref.ref[Tensor]
    pending: bool = True  # its backward pass may still come
    ambiguous: bool = False  # an earlier pass gave the same tensor, and its backward pass may still come, too


def _running_layer(number: int) -> int:
    """The layer during whose call a site's hook runs: a layer's input, after the first, is what the one before sent."""
    return max(number - 1, 0) // 4


def _in_backward() -> bool:
    """Whether this runs inside a backward pass: a checkpointed layer, again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _checked_path(path: str | None) -> Path:
    source = "path" if path else "FASTSTEER_PATH"
    wanted = path or os.environ.get("FASTSTEER_PATH", "auto")
    if wanted not in ("auto", "fused", "hooks"):
        raise ValueError(f"{source} is {wanted!r}: expected auto, fused or hooks")
    return wanted  # type: ignore[return-value]


def _as_plans(plans: Plans) -> tuple[list[Plan | None], bool]:
    """The plans as a list, and whether it has one per row."""
    if isinstance(plans, (Plan, Intervention)):
        return [_as_plan(plans, "plan")], False
    if plans is None or isinstance(plans, str) or not isinstance(plans, Iterable):
        raise TypeError(
            f"expected a Plan or a list with one Plan or None per row of the batch, got {type(plans).__name__}"
        )
    listed = [_as_plan(plan, f"plans[{i}]") for i, plan in enumerate(plans)]
    if not listed:
        raise ValueError("the list of plans is empty: give one Plan or None per row of the batch")
    return listed, True


def _as_plan(plan: object, what: str) -> Plan | None:
    if isinstance(plan, Intervention):
        return Plan([plan])
    if plan is None or isinstance(plan, Plan):
        return plan
    raise TypeError(
        f"{what} is a {type(plan).__name__}: expected a Plan, an intervention, or None in a list with one per row"
    )


def _distinct(plans: Iterable[Plan | None]) -> list[Plan]:
    """The different plan objects, in order."""
    return list({id(plan): plan for plan in plans if plan is not None}.values())


def is_steered(model: nn.Module) -> bool:
    """Whether the model is inside `with steer(...)`."""
    return bool(_active.get(model))


# Knowing when `generate` runs -----------------------------------------------------------------------------------------


def _watch_generate(changes: Changes, model: nn.Module, steering: Steering) -> None:
    """Wrap `model.generate` on the instance, once, for all steerings active on the model."""
    changes.on_undo(_unwatch_generate, model, steering)
    _active.setdefault(model, []).append(steering)
    if not hasattr(model, "generate") or hasattr(model.__dict__.get("generate"), "faststeer_replaces"):
        return
    original: Callable[..., Any] = model.generate  # type: ignore[assignment]

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(type(model).generate)  # type: ignore[attr-defined]
        arguments = signature.bind_partial(model, *args, **kwargs).arguments
        with changing() as generation:
            for steered in list(_active.get(model, [])):
                generation.on_undo(steered._prompts.end_generation)
                steered._generation_begins(arguments)
            return original(*args, **kwargs)

    generate.faststeer_replaces = model.__dict__.get("generate")  # type: ignore[attr-defined]
    model.generate = generate  # type: ignore[assignment]


def _unwatch_generate(model: nn.Module, steering: Steering) -> None:
    active = _active.get(model, [])
    if steering in active:
        active.remove(steering)
    wrapper: Any = model.__dict__.get("generate")
    if not active and hasattr(wrapper, "faststeer_replaces"):
        if wrapper.faststeer_replaces is None:
            del model.generate
        else:
            model.generate = wrapper.faststeer_replaces


def _device_of(module: nn.Module) -> torch.device:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return (
        torch.device("cpu") if device.type == "meta" else device
    )  # offloaded: each tensor's own device is met when it comes
