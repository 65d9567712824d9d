"""Programs: plans on the device. All tables are allocated once and changed with `copy_`, so that a captured graph that
reads them sees a new plan at its next replay.

A program holds the vectors of all its slots in one bank, each only once, however many plans use it.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from faststeer.intervention import Number
from faststeer.ops.tables import N_FIELDS, N_SCALARS, POSITION_MAX, POSITION_MIN, Field, Kind, Tables
from faststeer.plan import Entry, Plan, n_sites


@dataclass(frozen=True)
class Capacity:
    """How much a program can hold. Memory: 4 bytes x hidden per vector, 64 bytes per entry.

    Args:
        slots: plans at one time.
        vectors: bank rows: one per direction in use (equal ones are shared), k for a k-dimensional basis.
        entries: entries per slot: interventions x sites, plus one per latched gate.
    """

    slots: int
    vectors: int
    entries: int

    @classmethod
    def of(cls, plans: list[Plan], n_layers: int, hidden_size: int) -> Capacity:
        """Room for these plans and as much again for plans to come; at the least 8 slots, and an entry and a vector
        for every site in two slots."""
        compiled = [plan.compile(n_layers, hidden_size) for plan in plans]
        vectors = sum(
            len(block) for i, entries in enumerate(compiled) for block in _Blocks.of(entries, i).values.values()
        )
        entries = max(map(len, compiled), default=0)
        sites = n_sites(n_layers)
        return cls(slots=max(8, 2 * len(plans)), vectors=2 * max(vectors, sites), entries=2 * max(entries, sites))


class Program:
    """Fixed-address tables for a model of `n_layers` and `hidden_size`.

    Attributes:
        bank, fields, scalars, ranges: the tables (docs/design.md, 'Tables').
        depth, width, columns: per site, the most entries of any slot loaded so far, the most bank rows of one entry,
            the most probe columns. Host numbers for the reference back end.
        requires_grad: whether a loaded plan is being trained: then its values must be read anew before every use,
            through `live`.
        latches: per site, whether any plan loaded so far decides a gate there. latching: the most latched gates of any
            such plan.
        positioned: whether a loaded plan asks where tokens stand.
        by_site: what `tables` gives.
        unfinished: slots whose change was interrupted: what they hold is not known, until they are changed again. The
            next change of any slot empties them.
    """

    def __init__(self, n_layers: int, hidden_size: int, capacity: Capacity, device: torch.device | str = "cpu") -> None:
        self.n_layers, self.hidden_size = n_layers, hidden_size
        self.capacity, self.device = capacity, torch.device(device)
        sites, entries = n_sites(n_layers), capacity.slots * capacity.entries
        with torch.inference_mode(False):  # whoever makes them: they are used outside of it, too
            self.bank = torch.zeros(capacity.vectors, hidden_size, dtype=torch.float32, device=device)
            self.fields = torch.zeros(entries, N_FIELDS, dtype=torch.int32, device=device)
            self.scalars = torch.zeros(entries, N_SCALARS, dtype=torch.float32, device=device)
            self.ranges = torch.zeros(sites, capacity.slots, 2, dtype=torch.int32, device=device)
            self._ranges = list(self.ranges)
        self.depth, self.width, self.columns = [0] * sites, [1] * sites, [0] * sites
        self.latches, self.latching, self.positioned = [False] * sites, 0, False
        self.by_site = self._made_tables()
        self.plans: list[Plan | None] = [None] * capacity.slots
        self.requires_grad = False
        self._trained: set[int] = set()  # slots whose plans are being trained
        self._positioned: set[int] = set()  # slots whose plans ask where tokens stand
        self._rows: list[list[int]] = [[] for _ in range(capacity.slots)]  # per slot, each entry's first bank row
        self._allocation = _Allocation(capacity.vectors)
        self.unfinished: set[int] = set()

    def load(self, slot: int, plan: Plan | None) -> None:
        """Put `plan` into `slot`, replacing what is there; None empties the slot. Nothing is changed if it does not
        fit.

        Raises:
            ValueError: no such slot; the plan does not fit the model (see `Plan.compile`); capacity exceeded, with the
                capacity that is needed.
        """
        self._change({slot: plan})

    def load_all(self, plans: list[Plan]) -> list[int]:
        """Hold these plans and no others; returns their slots. A plan that is held already keeps its slot. Nothing is
        changed if they do not fit.

        Raises:
            ValueError: as `load`.
        """
        if len(plans) > self.capacity.slots:
            raise ValueError(
                f"capacity exceeded: {len(plans)} different plans, {self.capacity.slots} slots: use a larger "
                "Capacity(slots=...)"
            )
        slots = {id(plan): slot for slot, plan in enumerate(self.plans) if plan is not None}
        kept = {slots[id(plan)] for plan in plans if id(plan) in slots}
        free = iter([slot for slot in range(self.capacity.slots) if slot not in kept])
        changes: dict[int, Plan | None] = {
            slot: None for slot, plan in enumerate(self.plans) if plan is not None and slot not in kept
        }
        for plan in plans:
            if id(plan) not in slots:
                slots[id(plan)] = next(free)
                changes[slots[id(plan)]] = plan
        self._change(changes)
        return [slots[id(plan)] for plan in plans]

    def _change(self, changes: dict[int, Plan | None]) -> None:
        """Check everything, then write."""
        changes = dict.fromkeys(self.unfinished - changes.keys()) | changes
        compiled: dict[int, tuple[list[Entry], _Blocks]] = {}
        for slot, plan in changes.items():
            if not 0 <= slot < self.capacity.slots:
                raise ValueError(f"slot {slot} is out of range: the program has {self.capacity.slots} slots")
            entries = [] if plan is None else plan.compile(self.n_layers, self.hidden_size)
            if len(entries) > self.capacity.entries:
                raise ValueError(
                    f"capacity exceeded: the plan needs {len(entries)} entries, a slot holds {self.capacity.entries}: "
                    "use a larger Capacity(entries=...)"
                )
            compiled[slot] = entries, _Blocks.of(entries, slot)
        # A block that only unfinished slots use may not be in the bank.
        before = self._allocation.replaced({slot: {} for slot in self.unfinished})
        allocation = before.replaced({slot: blocks.values for slot, (_, blocks) in compiled.items()})
        first_row = {key: allocation.blocks[key].first for _, blocks in compiled.values() for key in blocks.values}
        there = {key: block.first for key, block in before.blocks.items()}
        self.unfinished.update(changes)
        self._allocation = allocation
        for slot in changes:
            self.plans[slot] = None
        self._write_bank(
            {
                first_row[key]: b.values[key]
                for _, b in compiled.values()
                for key in b.values
                if there.get(key) != first_row[key]
            }
        )
        for slot, (entries, blocks) in compiled.items():
            plan = self.plans[slot] = changes[slot]
            (self._trained.add if plan is not None and plan.requires_grad else self._trained.discard)(slot)
            asks = any(tuple(entry.position_range) != (POSITION_MIN, POSITION_MAX) for entry in entries)
            (self._positioned.add if asks else self._positioned.discard)(slot)
            self._rows[slot] = [first_row[key] for key in blocks.basis]
            self._write(slot, entries, blocks, first_row)
            self._note_shape(entries)
        self.requires_grad, self.positioned = bool(self._trained), bool(self._positioned)
        self.by_site = self._made_tables()
        self.unfinished.clear()

    def tables(self, site: int) -> Tables:
        """What an op reads at `site`."""
        return self.by_site[site]

    def _made_tables(self) -> list[Tables]:
        sizes = zip(self._ranges, self.depth, self.width, strict=True)
        return [Tables(self.bank, self.fields, self.scalars, *each) for each in sizes]

    def live(self) -> tuple[Tensor, Tensor]:
        """Bank and scalars with the present values of what is being trained, as functions of it: gradients flow from
        an op's output to the plan's tensors."""
        bank, scalars = self.bank.clone(), self.scalars.clone()
        for slot, plan in enumerate(self.plans):
            if plan is None or not plan.requires_grad:
                continue
            entries = plan.compile(self.n_layers, self.hidden_size)
            start = slot * self.capacity.entries
            for i, entry in enumerate(entries):
                row = self._rows[slot][i]
                index = torch.arange(row, row + entry.basis.shape[0], device=self.device)
                bank = bank.index_copy(0, index, entry.basis.to(bank))
                numbers = torch.stack(
                    [torch.as_tensor(n, dtype=torch.float32, device=self.device) for n in entry.scalars]
                )
                scalars = scalars.index_put(
                    (torch.tensor(start + i, device=self.device), torch.arange(2, device=self.device)), numbers
                )
        return bank, scalars

    def to(self, device: torch.device | str) -> Program:
        """A program with the same plans in the same slots on another device (a model spread over several has one
        each)."""
        other = Program(self.n_layers, self.hidden_size, self.capacity, device)
        other._change({slot: plan for slot, plan in enumerate(self.plans) if plan is not None})
        return other

    def _write_bank(self, blocks: dict[int, Tensor]) -> None:
        """Blocks by their first rows, in one copy per run of rows."""
        run: list[Tensor] = []
        start = end = 0
        for first in sorted(blocks):
            if run and first != end:
                send(torch.cat(run), self.bank[start:end])
                run = []
            if not run:
                start = end = first
            run.append(blocks[first])
            end += len(blocks[first])
        if run:
            send(torch.cat(run), self.bank[start:end])

    def _write(self, slot: int, entries: list[Entry], blocks: _Blocks, first_row: dict[bytes, int]) -> None:
        start = slot * self.capacity.entries
        sites = np.array([entry.site for entry in entries], dtype=np.int64)
        counts = np.bincount(sites, minlength=len(self.depth))
        # Entries are in the order of their sites. A site without any begins where the slot does.
        begins = np.where(counts > 0, start + np.cumsum(counts) - counts, start)
        send(torch.from_numpy(np.stack([begins, counts], 1).astype(np.int32)), self.ranges[:, slot])
        if entries:
            gates = [0 if key is None else first_row[key] for key in blocks.gate]
            packed = [_pack(entry, *rows) for entry, *rows in zip(entries, self._rows[slot], gates, strict=True)]
            numbers = [[*map(_value, entry.scalars), entry.gate_threshold, 0.0] for entry in entries]
            for table, values in ((self.fields, np.array(packed, np.int32)), (self.scalars, np.array(numbers, "f4"))):
                send(torch.from_numpy(values), table[start : start + len(entries)])

    def _note_shape(self, entries: list[Entry]) -> None:
        counts: dict[int, int] = {}
        for entry in entries:
            counts[entry.site] = counts.get(entry.site, 0) + 1
            self.depth[entry.site] = max(self.depth[entry.site], counts[entry.site])
            self.width[entry.site] = max(self.width[entry.site], entry.basis.shape[0])
            self.latches[entry.site] |= entry.kind == Kind.LATCH
            if entry.probe_column >= 0:
                self.columns[entry.site] = max(self.columns[entry.site], entry.probe_column + entry.basis.shape[0])
        self.latching = max(self.latching, sum(entry.kind == Kind.LATCH for entry in entries))


def send(values: Tensor, target: Tensor) -> None:
    """Copy from the CPU into a table. On a GPU by way of pinned memory, in the stream's order: the host does not wait,
    and PyTorch keeps the pinned memory until the copy is done."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=target.is_cuda)


def _value(number: Number) -> float:
    return float(number.detach() if isinstance(number, Tensor) else number)


def _pack(entry: Entry, vector: int, gate_vector: int) -> list[int]:
    row = [0] * N_FIELDS
    row[Field.KIND] = int(entry.kind)
    row[Field.VECTOR] = vector
    row[Field.COUNT] = entry.basis.shape[0]
    row[Field.POSITION_LOW], row[Field.POSITION_HIGH] = entry.position_range
    row[Field.GATE_MODE] = entry.gate_mode
    row[Field.GATE_VECTOR] = gate_vector
    row[Field.GATE_STATE] = entry.gate_state
    row[Field.KEEP_NORM] = int(entry.keep_norm)
    row[Field.PROBE] = entry.probe_column
    return row


_TRAINED = b"trained "  # begins the key of a block that is its place alone: its values are others each time


@dataclass(frozen=True)
class _Blocks:
    """The distinct blocks of bank rows `[k, hidden]` that a plan's entries use. Equal values are one block, but what
    is being trained is its entry's own, since its values will move."""

    values: dict[bytes, Tensor]
    basis: list[bytes]  # per entry
    gate: list[bytes | None]
    keys: dict[int, bytes]  # of tensors seen already, by identity

    @classmethod
    def of(cls, entries: list[Entry], slot: int) -> _Blocks:
        blocks = cls({}, [], [], {})
        for i, entry in enumerate(entries):
            own = _TRAINED + f"{slot} {i} {len(entry.basis)}".encode() if entry.basis.requires_grad else None
            blocks.basis.append(blocks._add(entry.basis, own))
            blocks.gate.append(None if entry.gate_vector is None else blocks._add(entry.gate_vector))
        return blocks

    def _add(self, block: Tensor, key: bytes | None = None) -> bytes:
        known = None if key else self.keys.get(id(block))
        if known is not None:
            return known
        values = block.detach().to("cpu", torch.float32).contiguous()
        if key is None:
            values_hash = hashlib.blake2b(values.numpy(), digest_size=16).digest()  # type: ignore[arg-type]
            key = self.keys[id(block)] = len(values).to_bytes(4, "little") + values_hash
        self.values[key] = values
        return key


@dataclass(frozen=True)
class _Block:
    """Where a block lies in the bank, and the slots that use it."""

    first: int
    length: int
    users: frozenset[int] = frozenset()


class _Allocation:
    """Which bank rows belong to which block, and which slots use it. First fit; a block goes with its last slot. A
    change makes another one, so that it is made whole or not at all."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.blocks: dict[bytes, _Block] = {}
        self._of_slot: dict[int, frozenset[bytes]] = {}
        self._free = [(0, rows)]  # (first, end) of what nobody has, ascending, no two adjacent

    def replaced(self, changes: Mapping[int, Mapping[bytes, Tensor]]) -> _Allocation:
        """With these blocks for each slot instead of those it has.

        Raises:
            ValueError: they do not fit.
        """
        other = _Allocation(self._rows)
        other.blocks, other._of_slot, other._free = self.blocks.copy(), self._of_slot.copy(), self._free.copy()
        for slot, blocks in changes.items():
            for key in other._of_slot.get(slot, frozenset()) - blocks.keys():
                other._leave(key, slot)
        for slot, blocks in changes.items():
            other._of_slot[slot] = frozenset(blocks)
            for key, values in sorted(blocks.items(), key=lambda item: -len(item[1])):
                block = other.blocks.get(key) or _Block(other._take(len(values)), len(values))
                other.blocks[key] = replace(block, users=block.users | {slot})
        return other

    def _leave(self, key: bytes, slot: int) -> None:
        block = self.blocks[key]
        if users := block.users - {slot}:
            self.blocks[key] = replace(block, users=users)
        else:
            del self.blocks[key]
            self._give_back(block.first, block.first + block.length)

    def _give_back(self, first: int, end: int) -> None:
        at = bisect.bisect(self._free, (first, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == first:
            at -= 1
            first = self._free.pop(at)[0]
        self._free.insert(at, (first, end))

    def _take(self, length: int) -> int:
        for i, (first, end) in enumerate(self._free):
            if end - first >= length:
                self._free[i : i + 1] = [(first + length, end)] if end - first > length else []
                return first
        raise ValueError(
            f"capacity exceeded: {length} more bank row(s) do not fit into {self._rows} (in use: "
            f"{sum(block.length for block in self.blocks.values())}): use a larger Capacity(vectors=...)"
        )
