"""Programs: plans on the device. All tables are allocated once and changed with `copy_`, so that a captured graph that
reads them sees a new plan at its next replay.

A program holds the vectors of all its slots in one bank, each only once, however many plans use it.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from faststeer.compile import Blocks, Entry, Need, compile_plan
from faststeer.intervention import Number
from faststeer.ops import Prepared, prepare
from faststeer.ops.tables import N_FIELDS, POSITION_MAX, POSITION_MIN, EntryKind, Field, Tables
from faststeer.plan import Plan, n_sites

_SCALARS = slice(int(Field.A), int(Field.B) + 1)  # columns of `entries`


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
        need = Need.of([compile_plan(plan, n_layers, hidden_size) for plan in plans])
        sites = n_sites(n_layers)
        return cls(max(8, 2 * need.slots), 2 * max(need.vectors, sites), 2 * max(need.entries, sites))


class Program:
    """Fixed-address tables for a model of `n_layers` and `hidden_size`.

    Attributes:
        bank, entries, ranges: the tables (docs/design.md, 'Tables').
        depth, width, columns: per site, the most entries of any slot loaded so far, the most bank rows of one entry,
            the most probe columns. Host numbers for the reference back end.
        requires_grad: whether a loaded plan is being trained; then `live` must read its values before every use.
        latches: per site, whether any plan loaded so far decides a gate there. latching: the largest number of latched
            gates of such a plan.
        positioned: whether a loaded plan depends on positions.
        by_site: the tables of every site, as `tables` returns them.
        plain: per site, whether no plan loaded so far has a probe or decides a gate there.
        unfinished: slots whose change was interrupted, so that their content is not known. The next change of any slot
            empties them.
    """

    def __init__(self, n_layers: int, hidden_size: int, capacity: Capacity, device: torch.device | str = "cpu") -> None:
        if not isinstance(capacity, Capacity):
            raise TypeError(
                f"capacity is a {type(capacity).__name__}: expected faststeer.Capacity(slots, vectors, entries)"
            )
        self.n_layers, self.hidden_size = n_layers, hidden_size
        self.capacity, self.device = capacity, torch.device(device)
        sites, entries = n_sites(n_layers), capacity.slots * capacity.entries
        with torch.inference_mode(False):  # whoever makes them: they are used outside of it, too
            self.bank = torch.zeros(capacity.vectors, hidden_size, dtype=torch.float32, device=device)
            self.entries = torch.zeros(entries, N_FIELDS, dtype=torch.int32, device=device)
            self.ranges = torch.zeros(sites, capacity.slots, 2, dtype=torch.int32, device=device)
            self._ranges = list(self.ranges)
        self.depth, self.width, self.columns = [0] * sites, [1] * sites, [0] * sites
        self.latches, self.latching, self.positioned = [False] * sites, 0, False
        self.by_site, self.plain = self._made_tables(), [True] * sites
        self.plans: list[Plan | None] = [None] * capacity.slots
        self.requires_grad = False
        self._trained: set[int] = set()  # slots whose plans are being trained
        self._positioned: set[int] = set()  # slots whose plans ask where tokens stand
        self._rows: list[list[int]] = [[] for _ in range(capacity.slots)]  # per slot, each entry's first bank row
        self._allocation = _Allocation(capacity.vectors)
        self.unfinished: set[int] = set()
        self._prepared: tuple[Tensor, Tensor | None, list[bool], int, Prepared] | None = None

    def load(self, slot: int, plan: Plan | None) -> None:
        """As `change`, for one slot."""
        self.change({slot: plan})

    def change(self, changes: Mapping[int, Plan | None]) -> None:
        """Load a plan into each of these slots, in place of the one before; None empties a slot. Nothing is changed if
        they do not all fit. If the free rows of the bank are not side by side, the rows in use are moved together.

        Raises:
            ValueError: no such slot; a plan that does not fit the model (see `compile_plan`); capacity exceeded, with
                the capacity that is needed.
        """
        changes = dict.fromkeys(self.unfinished.difference(changes)) | dict(changes)
        compiled: dict[int, tuple[list[Entry], Blocks]] = {}
        for slot, plan in changes.items():
            if not 0 <= slot < self.capacity.slots:
                raise ValueError(f"slot {slot} is out of range: the program has {self.capacity.slots} slots")
            entries = [] if plan is None else compile_plan(plan, self.n_layers, self.hidden_size)
            if len(entries) > self.capacity.entries:
                raise ValueError(
                    f"capacity exceeded: the plan needs {len(entries)} entries, a slot holds {self.capacity.entries}: "
                    "use a larger Capacity(entries=...)"
                )
            compiled[slot] = entries, Blocks.of(entries, slot)
        # A block that only unfinished slots use may not be in the bank.
        known, _ = self._allocation.replaced({slot: {} for slot in self.unfinished})
        allocation, new = known.replaced({slot: blocks.values for slot, (_, blocks) in compiled.items()})
        plans = self.plans.copy()
        self.unfinished.update(range(self.capacity.slots) if allocation.moved else changes)
        self._allocation = allocation
        for slot in self.unfinished:
            self.plans[slot] = None
        if allocation.moved:
            self._move(allocation.moved)
        first_row = {key: allocation.blocks[key].first for _, blocks in compiled.values() for key in blocks.values}
        self._write_bank({first_row[key]: values for key, values in new.items()})
        for slot, (entries, blocks) in compiled.items():
            plan = plans[slot] = changes[slot]
            (self._trained.add if plan is not None and plan.requires_grad else self._trained.discard)(slot)
            asks = any(tuple(entry.position_range) != (POSITION_MIN, POSITION_MAX) for entry in entries)
            (self._positioned.add if asks else self._positioned.discard)(slot)
            self._rows[slot] = [first_row[key] for key in blocks.basis]
            self._write(slot, entries, blocks, first_row)
            self._note_shape(entries)
        self.requires_grad, self.positioned = bool(self._trained), bool(self._positioned)
        self.by_site = self._made_tables()
        self.plain = [not each for each in map(max, self.columns, self.latches)]
        self.plans[:] = plans
        self.unfinished.clear()

    def tables(self, site: int) -> Tables:
        """The tables that an op reads at `site`."""
        return self.by_site[site]

    def prepared(self, rows: Tensor, gates: Tensor | None) -> Prepared:
        """The tables of all sites with these rows, see `ops.prepare`; those of the last rows and gates are kept."""
        thread, last = threading.get_ident(), self._prepared
        if last is None or last[0] is not rows or last[1] is not gates or last[2:4] != (self.plain, thread):
            prepared = prepare(self.bank, self.entries, self.ranges, rows, gates, self.plain)
            last = self._prepared = rows, gates, self.plain, thread, prepared
        return last[4]

    def __getstate__(self) -> dict[str, object]:
        """What is copied: a copy's tables lie elsewhere, so that it prepares its own."""
        return vars(self) | {"_prepared": None}

    def _made_tables(self) -> list[Tables]:
        sizes = zip(self._ranges, self.depth, self.width, strict=True)
        return [Tables(self.bank, self.entries, *each) for each in sizes]

    def live(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bank, entries and scalars with the present values of what is being trained, bank and scalars as functions of
        it: gradients flow from an op's output to the plan's tensors."""
        bank, table = self.bank.clone(), self.entries.clone()
        scalars = table[:, _SCALARS].view(torch.float32).clone()
        for slot, plan in enumerate(self.plans):
            if plan is None or not plan.requires_grad:
                continue
            entries = compile_plan(plan, self.n_layers, self.hidden_size)
            start = slot * self.capacity.entries
            for i, entry in enumerate(entries):
                row = self._rows[slot][i]
                index = torch.arange(row, row + entry.basis.shape[0], device=self.device)
                bank = bank.index_copy(0, index, entry.basis.to(bank))
                numbers = torch.stack(
                    [torch.as_tensor(n, dtype=torch.float32, device=self.device) for n in entry.scalars]
                )
                scalars = scalars.index_put((torch.tensor(start + i, device=self.device),), numbers)
        table[:, _SCALARS] = scalars.detach().view(torch.int32)
        return bank, table, scalars

    def to(self, device: torch.device | str) -> Program:
        """A program with the same plans in the same slots on another device (a model spread over several has one
        each)."""
        other = Program(self.n_layers, self.hidden_size, self.capacity, device)
        other.change({slot: plan for slot, plan in enumerate(self.plans) if plan is not None})
        return other

    def _move(self, rows: list[int]) -> None:
        """Copy these rows of the bank to its first ones, and have every entry read them there."""
        to = [0] * self.capacity.vectors
        for place, row in enumerate(rows):
            to[row] = place
        self._rows = [[to[row] for row in firsts] for firsts in self._rows]
        self.bank[: len(rows)] = self.bank[torch.tensor(rows, device=self.device)]
        places = torch.tensor(to, dtype=torch.int32, device=self.device)
        for field in (Field.VECTOR, Field.GATE_VECTOR):
            self.entries[:, field] = places[self.entries[:, field].long()]

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

    def _write(self, slot: int, entries: list[Entry], blocks: Blocks, first_row: dict[bytes, int]) -> None:
        start = slot * self.capacity.entries
        sites = np.array([entry.site for entry in entries], dtype=np.int64)
        counts = np.bincount(sites, minlength=len(self.depth))
        # Entries are in the order of their sites. A site without any begins where the slot does.
        begins = np.where(counts > 0, start + np.cumsum(counts) - counts, start)
        send(torch.from_numpy(np.stack([begins, counts], 1).astype(np.int32)), self.ranges[:, slot])
        if entries:
            gates = [0 if key is None else first_row[key] for key in blocks.gate]
            packed = [_pack(entry, *rows) for entry, *rows in zip(entries, self._rows[slot], gates, strict=True)]
            values = np.array(packed, np.int32)
            numbers = [[*map(_value, entry.scalars), entry.gate_threshold] for entry in entries]
            values.view(np.float32)[:, Field.A : Field.THRESHOLD + 1] = numbers
            send(torch.from_numpy(values), self.entries[start : start + len(entries)])

    def _note_shape(self, entries: list[Entry]) -> None:
        counts: dict[int, int] = {}
        for entry in entries:
            counts[entry.site] = counts.get(entry.site, 0) + 1
            self.depth[entry.site] = max(self.depth[entry.site], counts[entry.site])
            self.width[entry.site] = max(self.width[entry.site], entry.basis.shape[0])
            self.latches[entry.site] |= entry.kind == EntryKind.LATCH
            if entry.probe_column >= 0:
                self.columns[entry.site] = max(self.columns[entry.site], entry.probe_column + entry.basis.shape[0])
        self.latching = max(self.latching, sum(entry.kind == EntryKind.LATCH for entry in entries))


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


@dataclass(frozen=True)
class _Block:
    """Where a block lies in the bank, and the slots that use it."""

    first: int
    length: int
    users: frozenset[int] = frozenset()


class _Allocation:
    """Which bank rows belong to which block, and which slots use it. First fit; a block goes with its last slot. A
    change makes another one, so that it is made whole or not at all.

    Attributes:
        moved: where the change that made it moved blocks together: the rows that are the bank's first ones since, in
            order.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.used, self.moved = rows, 0, list[int]()
        self.blocks: dict[bytes, _Block] = {}
        self.of_slot: dict[int, frozenset[bytes]] = {}
        self._free = [(0, rows)]  # (first, end) of what nobody has, ascending, no two adjacent

    def replaced(self, changes: Mapping[int, Mapping[bytes, Tensor]]) -> tuple[_Allocation, dict[bytes, Tensor]]:
        """With these blocks for each slot instead of those it has; and those that are new in the bank.

        Raises:
            ValueError: they do not fit, however they lie.
        """
        blocks = {key: values for entries in changes.values() for key, values in entries.items()}
        before = {key for slot in changes for key in self.of_slot.get(slot, ())}
        gone = [key for key in before - blocks.keys() if self.blocks[key].users <= changes.keys()]
        new = {key: values for key, values in blocks.items() if key not in self.blocks}
        needed, used = sum(map(len, new.values())), self.used - sum(self.blocks[key].length for key in gone)
        if used + needed > self.rows:
            raise ValueError(
                f"capacity exceeded: {needed} more bank row(s) do not fit into {self.rows} (in use: {used}): use a "
                "larger Capacity(vectors=...)"
            )
        other = _Allocation(self.rows)
        other.blocks, other.used, other._free = self.blocks.copy(), used + needed, self._free.copy()
        other.of_slot = self.of_slot | {slot: frozenset(entries) for slot, entries in changes.items()}
        for key in gone:
            block = other.blocks.pop(key)
            other._give_back(block.first, block.first + block.length)
        for key, values in sorted(new.items(), key=lambda item: -len(item[1])):
            other.blocks[key] = _Block(other._take(len(values)), len(values))
        for key in (before | blocks.keys()) & other.blocks.keys():
            block = other.blocks[key]
            now = {slot for slot, entries in changes.items() if key in entries}
            other.blocks[key] = replace(block, users=block.users.difference(changes) | now)
        return other, new

    def _give_back(self, first: int, end: int) -> None:
        at = bisect.bisect(self._free, (first, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == first:
            at -= 1
            first = self._free.pop(at)[0]
        self._free.insert(at, (first, end))

    def _take(self, length: int) -> int:
        """The first of so many rows side by side; the blocks move together where that alone makes room."""
        run = next((i for i, (first, end) in enumerate(self._free) if end - first >= length), None)
        if run is None:
            run = 0
            for key, block in sorted(self.blocks.items(), key=lambda item: item[1].first):
                self.blocks[key] = replace(block, first=len(self.moved))
                self.moved += range(block.first, block.first + block.length)
            self._free = [(len(self.moved), self.rows)]
        first, end = self._free[run]
        self._free[run : run + 1] = [(first + length, end)] if end - first > length else []
        return first


class SlotPool:
    """Which plan has which slot of a program, by a key of the caller's. A plan that nobody uses stays until its slot or
    its room is needed; the one left alone for longest goes first.

    Args:
        change: puts plans into slots, all of them or, with a ValueError, none (`Program.change`).
        loaded: the plan in each slot, as `change` leaves them.

    Attributes:
        slots: of the plans that are held, by key, the one taken longest ago first.
    """

    def __init__(self, change: Callable[[Mapping[int, Plan | None]], None], loaded: Sequence[Plan | None]) -> None:
        self.slots: dict[Hashable, int] = {}
        self._change, self._loaded = change, loaded
        self._users: Counter[Hashable] = Counter()

    def take(self, plans: Mapping[Hashable, Plan], *, alone: bool = False) -> bool:
        """Give each of these plans a slot, and one user more; load together those that have none.

        Args:
            alone: hold these and no others: whatever else there is goes, and nobody uses it.

        Returns:
            Whether they have slots. Else they wait for others to leave; nothing has changed.

        Raises:
            ValueError: they do not fit, and nobody is in the way; nothing has changed.
        """
        # An interrupted change may have left nothing in a slot.
        self.slots = {key: slot for key, slot in self.slots.items() if self._loaded[slot] is not None}
        if alone:
            self._users.clear()
        missing = {key: plan for key, plan in plans.items() if key not in self.slots}
        if missing or alone:
            others = [key for key in self.slots if key not in plans]
            idle = [key for key in others if not self._users[key]]
            short = len(self.slots) + len(missing) - len(self._loaded)
            going = len(idle) if alone else max(0, short)
            while not self._exchange(idle[:going], missing, wait=len(others) > len(idle) or going < len(idle)):
                if going >= len(idle):
                    return False
                going += 1
        for key in plans:
            self.slots[key] = self.slots.pop(key)  # behind all the others
            self._users[key] += 1
        return True

    def leave(self, keys: Iterable[Hashable]) -> None:
        """Each of these plans has one user fewer, and stays."""
        for key in keys:
            self._users[key] -= 1

    def release(self) -> None:
        """Nobody uses any plan. Those that are being trained go: their values will be others."""
        self._users.clear()
        held = {key: self._loaded[slot] for key, slot in self.slots.items()}
        if trained := [key for key, plan in held.items() if plan is not None and plan.requires_grad]:
            self._exchange(trained, {})

    def forget(self, slots: Collection[int]) -> None:
        """Somebody else has put something into these slots."""
        self.slots = {key: slot for key, slot in self.slots.items() if slot not in slots}

    def _exchange(self, going: Collection[Hashable], coming: Mapping[Hashable, Plan], wait: bool = False) -> bool:
        """Load plans in the place of others. `wait`: return False where they do not fit, instead of a ValueError."""
        staying = {key: slot for key, slot in self.slots.items() if key not in going}
        free = sorted(set(range(len(self._loaded))) - set(staying.values()))
        placed = dict(zip(coming, free, strict=False))
        changes: dict[int, Plan | None] = {slot: None for slot in free if self._loaded[slot] is not None}
        before, self.slots = self.slots, staying  # at once: nobody is to find what an interrupt leaves in a slot
        try:
            if len(coming) > len(free):
                raise ValueError(
                    f"capacity exceeded: {len(staying) + len(coming)} different plans, {len(self._loaded)} slots: use "
                    "a larger Capacity(slots=...)"
                )
            self._change(changes | {slot: coming[key] for key, slot in placed.items()})
        except ValueError:
            self.slots = before
            if wait:
                return False
            raise
        self.slots |= placed
        for key in going:
            del self._users[key]
        return True
