"""Which plan each slot of the engine's program holds. A plan stays from one call of `generate` to the next, until its
room is needed: loading is host work that a GPU would wait for."""

from __future__ import annotations

from typing import Any

from faststeer.hf import Steering
from faststeer.plan import Plan


class Slots:
    """The slots of a steering that nobody else loads plans into."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering
        self._slots: dict[Any, int] = {}  # Plan.key -> slot
        self._users: dict[int, int] = {}  # slot -> requests, the slot that was taken last at the end
        self._now: dict[int, int] = {}  # of this call: id of a plan -> slot
        self._plans: list[Plan] = []  # whose ids these are

    def open(self) -> None:
        """A call begins: what an earlier one has not finished loading goes."""
        for slot in list(self.steering.unfinished):
            self._forget(slot)
            self.steering.load(slot, None)

    def take(self, plan: Plan, others: bool) -> int | None:
        """The slot of a plan, which is loaded if it is not there; None: it must wait for others to leave.

        Raises:
            ValueError: it does not fit, and nobody else is in the way (`others`: whether there is).
        """
        slot = self._now.get(id(plan))
        if slot is None:
            slot = self._slots.get(key := plan.key)
            if slot is None and (slot := self._load(plan, others)) is None:
                return None
            self._slots[key] = self._now[id(plan)] = slot
            self._plans.append(plan)
        self._users[slot] = self._users.pop(slot, 0) + 1
        return slot

    def _load(self, plan: Plan, others: bool) -> int | None:
        """Into a slot that is empty, else into the one left alone for longest. Vectors of plans that nobody uses make
        room one by one."""
        idle = [slot for slot, users in self._users.items() if not users]
        fresh = next((slot for slot in range(self.steering.capacity.slots) if slot not in self._users), None)
        if fresh is None and not idle:
            return None
        target = idle.pop(0) if fresh is None else fresh
        self._forget(target)
        while True:
            try:
                self.steering.load(target, plan)
                return target
            except ValueError:
                if not idle:
                    # What the slot held before is still in the program.
                    self.steering.load(target, None)
                    if others:
                        return None
                    raise
                self.steering.load(slot := idle.pop(0), None)
                self._forget(slot)

    def leave(self, slot: int) -> None:
        """One request fewer. The plan stays."""
        self._users[slot] -= 1

    def close(self) -> None:
        """Nobody uses any slot. Plans that are being trained go: what they hold will be another thing."""
        self._now.clear()
        self._plans.clear()
        self._users = dict.fromkeys(self._users, 0)
        for slot, plan in enumerate(self.steering.loaded):
            if plan is not None and plan.requires_grad:
                self.steering.load(slot, None)
                self._forget(slot)

    def _forget(self, slot: int) -> None:
        self._users.pop(slot, None)
        for slots in (self._slots, self._now):
            for key in [key for key, other in slots.items() if other == slot]:
                del slots[key]
