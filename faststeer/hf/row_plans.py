"""Which plan each row of a batch has: the plans on every device that the model is on, and the table of their slots."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from faststeer.hf.positions import Inputs
from faststeer.hf.streams import GenerateCall
from faststeer.plan import Plan, distinct
from faststeer.program import Capacity, Program, SlotPool


class RowPlans:
    """Plans in slots, one for all rows or one per row.

    Attributes:
        program: the plans on the device where the layers begin; elsewhere are copies.
        plans: one, or one per row.
        per_row: which of the two.
        version: another number whenever any of it changes, before and after the change.
    """

    def __init__(
        self,
        plans: list[Plan | None],
        per_row: bool,
        n_layers: int,
        hidden_size: int,
        capacity: Capacity | None,
        home: torch.device,
    ) -> None:
        self.plans, self.per_row, self.version = plans, per_row, 0
        capacity = capacity or Capacity.of(distinct(self.plans), n_layers, hidden_size)
        self.program = Program(n_layers, hidden_size, capacity, home)
        self._programs = {home: self.program}
        self._pool = SlotPool(self._change, self.program.plans)
        self._slots: dict[torch.device, Tensor] = {}  # per device [plans], the slot of each plan in the list
        self._changing = False
        self._expanded: dict[tuple[torch.device, int, int], Tensor] = {}  # by device, batch and length
        self._load(self.plans, self.per_row)

    def on(self, device: torch.device) -> Program:
        """The plans on a device."""
        if device not in self._programs:
            self._programs[device] = self.program.to(device)
        return self._programs[device]

    def tables(self) -> list[Tensor]:
        """Everything on devices that a captured graph reads: it is changed in place."""
        programs = self._programs.values()
        return [t for p in programs for t in (p.bank, p.entries, p.ranges)] + [*self._slots.values()]

    def assign(self, plans: list[Plan | None], per_row: bool) -> list[bool] | None:
        """Other plans. Returns which rows keep the plan that they have; None: the rows are other ones."""
        same = self.per_row == per_row and len(self.plans) == len(plans)
        kept = [old is new for old, new in zip(self.plans, plans, strict=True)] if same else None
        self._load(plans, per_row)
        return kept

    def _load(self, plans: list[Plan | None], per_row: bool) -> None:
        self.version += 1
        self._pool.take({id(plan): plan for plan in plans if plan is not None}, alone=True)
        self._changing = True
        slots = [-1 if plan is None else self._pool.slots[id(plan)] for plan in plans]
        table = torch.tensor(slots, dtype=torch.int32, device="cpu")
        fits = bool(self._slots) and len(plans) == len(self.plans)
        self.plans, self.per_row = plans, per_row
        if not fits:
            with torch.inference_mode(False):
                self._slots = {device: table.to(device, copy=True) for device in self._programs}
            self._expanded.clear()
        for own in self._slots.values():
            own.copy_(table)
        for (device, batch, length), rows in self._expanded.items():
            rows[0].copy_(self._of_rows(device, batch).repeat_interleave(length))
        self._changing = False
        self.version += 1

    @property
    def interrupted(self) -> bool:
        """Whether a change was begun and not ended: what rows and slots hold is not known until they are changed
        again."""
        return self._changing or any([program.unfinished for program in self._programs.values()])

    def change(self, plans: Mapping[int, Plan | None]) -> None:
        """As `Program.change`, on all devices, past what `assign` keeps there."""
        self._change(plans)
        self._pool.forget(plans)

    def _change(self, plans: Mapping[int, Plan | None]) -> None:
        self.version += 1
        for program in self._programs.values():  # equal ones: the first refuses what does not fit, before any changes
            program.change(plans)
        self.version += 1

    def need_shape_alone(self, batch: int) -> bool:
        """Whether passes of one shape are all alike: no plan asks where tokens stand, what was decided or what is being
        trained, and each row has the plan of its number."""
        program = self.program
        if program.positioned or program.latching or program.requires_grad:
            return False
        return not self.per_row or batch == len(self.plans)

    def rows(self, of: Inputs, run: GenerateCall | None) -> Tensor:
        """`[3, batch * length]`: slot, position (0) and sequence of every token of a pass. Beams and return sequences
        of a prompt stand side by side and share its plan."""
        if self.per_row and (run is None or run.batch is None or of.batch % len(self.plans)):
            self.check_batch(of.batch)
        key = of.device, of.batch, of.length
        # A graph reads the plans' own table.
        if of.recorded:
            return self._expand(*key)
        if (rows := self._expanded.get(key)) is None:
            if len(self._expanded) > 32:
                self._expanded.clear()
            with torch.inference_mode(False):
                rows = self._expanded[key] = self._expand(*key)
        return rows

    def _expand(self, device: torch.device, batch: int, length: int) -> Tensor:
        slot, sequence = self._of_rows(device, batch), torch.arange(batch, dtype=torch.int32, device=device)
        return torch.stack((slot, torch.zeros_like(sequence), sequence)).repeat_interleave(length, 1)

    def _of_rows(self, device: torch.device, batch: int) -> Tensor:
        if device not in self._slots:
            self._slots[device] = next(iter(self._slots.values())).to(device)
        table = self._slots[device]
        return table.repeat_interleave(batch // len(table)) if self.per_row else table.expand(batch)

    @property
    def probing(self) -> bool:
        """Whether a plan probes."""
        return any(intervention.probe for plan in distinct(self.plans) for intervention in plan)

    def slots(self, requests: Tensor) -> Tensor:
        """The slots of requests `[tokens]`, by their numbers."""
        table = self._of_rows(requests.device, len(self.plans))
        return table[requests] if self.per_row else table[:1].expand(len(requests))

    def check_request(self, number: int) -> None:
        """Raise ValueError unless there is a plan for a request, counted from 0 in the order of adding."""
        if self.per_row and number >= len(self.plans):
            raise ValueError(
                f"there are {len(self.plans)} plans, but request {number} (counted from 0, in the order in which "
                "requests are added) has none: give one plan per request, or a single plan for all"
            )

    def check_batch(self, batch: int) -> None:
        """Raise ValueError unless there is a plan for every row."""
        if self.per_row and batch != len(self.plans):
            raise ValueError(
                f"the batch has {batch} rows, but there are {len(self.plans)} plans: give one plan per row, in "
                "order, or a single plan for all rows"
            )
