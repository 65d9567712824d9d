"""Programs: plans in slots of tables that never move, refused as a whole when they do not fit."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from placing import placed
from strategies import randn
from torch import Tensor

import faststeer as fs
from faststeer import ops
from faststeer.ops import steer
from faststeer.plan import site
from faststeer.program import SlotPool

HIDDEN, N_LAYERS = 16, 2
TABLES = ("bank", "entries", "ranges")
ROOM = fs.Capacity(slots=4, vectors=12, entries=6)


def add(seed: int, layers=0, **more) -> fs.Plan:
    return fs.Plan([fs.Add(randn(seed, HIDDEN), layers=layers, **more)])


def ablate(seed: int, k: int, layers=0) -> fs.Plan:
    return fs.Plan([fs.Ablate(randn(seed, k, HIDDEN), layers=layers)])


def outputs(program: fs.Program) -> Tensor:
    """What every slot does to the same rows at every site: `[sites, slots, rows, hidden]`."""
    x = randn(99, 3, HIDDEN)
    rows = [placed([slot] * 3) for slot in range(program.capacity.slots)]
    return torch.stack(
        [torch.stack([steer(x, program.tables(site), r) for r in rows]) for site in range(4 * program.n_layers + 1)]
    )


def fresh(plans: dict[int, fs.Plan], capacity: fs.Capacity = ROOM) -> fs.Program:
    program = fs.Program(N_LAYERS, HIDDEN, capacity)
    for slot, plan in plans.items():
        program.load(slot, plan)
    return program


def snapshot(program: fs.Program) -> dict[str, Tensor]:
    return {name: getattr(program, name).clone() for name in TABLES}


def unchanged(program: fs.Program, before: dict[str, Tensor], plans: list) -> bool:
    return all(torch.equal(getattr(program, name), before[name]) for name in TABLES) and program.plans == plans


def test_addresses_never_change():
    program = fresh({})
    addresses = {name: getattr(program, name).data_ptr() for name in TABLES}
    for i in range(30):
        program.load(i % 4, [add(i), ablate(i, 2), None, add(i, layers="all")][i % 4 if i % 3 else 0])
    program.change({0: ablate(50, 3), 1: add(51), 2: None, 3: None})
    assert {name: getattr(program, name).data_ptr() for name in TABLES} == addresses


def test_slots_are_independent():
    plans = {0: add(0), 1: ablate(1, 3), 2: add(2, layers="all"), 3: add(3, at="attn_out")}
    program = fresh(plans)
    together = outputs(program)
    for slot, plan in plans.items():
        assert torch.equal(together[:, slot], outputs(fresh({slot: plan}))[:, slot])
    program.load(1, add(7))
    after = outputs(program)
    for slot in (0, 2, 3):
        assert torch.equal(after[:, slot], together[:, slot])
    assert torch.equal(after[:, 1], outputs(fresh({1: add(7)}))[:, 1])


def test_clearing_a_slot_steers_nothing():
    program = fresh({0: add(0), 1: ablate(1, 2)})
    program.load(1, None)
    x = randn(99, 3, HIDDEN)
    result = outputs(program)
    assert torch.equal(result[:, 1], x.expand_as(result[:, 1]))
    assert torch.equal(result[:, 0], outputs(fresh({0: add(0)}))[:, 0])


def test_an_empty_plan_steers_nothing():
    result = outputs(fresh({0: fs.Plan()}))
    assert torch.equal(result, randn(99, 3, HIDDEN).expand_as(result))


def test_rows_of_the_bank_are_used_again():
    """Loading and clearing for ever, in sizes that leave gaps, never runs out, and each plan does what it does
    alone."""
    program = fresh({}, fs.Capacity(slots=2, vectors=6, entries=4))
    for i in range(40):
        plan = ablate(i, 1 + i % 3) if i % 5 else None
        program.load(i % 2, plan)
        assert torch.equal(outputs(program)[:, i % 2], outputs(fresh({i % 2: plan}, program.capacity))[:, i % 2])


def test_equal_vectors_are_stored_once():
    """One direction at four layers in three slots takes one row of the bank."""
    shared = randn(0, HIDDEN)
    plans = [fs.Plan([fs.Add(shared.clone(), float(i), layers="all")]) for i in range(1, 4)]
    program = fresh(dict(enumerate(plans)), fs.Capacity(slots=3, vectors=1, entries=4))
    expected = [outputs(fresh({i: plan}))[:, i] for i, plan in enumerate(plans)]
    assert all(torch.equal(outputs(program)[:, i], expected[i]) for i in range(3))
    program.load(0, None)  # the others still use the row
    assert torch.equal(outputs(program)[:, 1], expected[1])
    with pytest.raises(ValueError, match="capacity exceeded"):
        program.load(0, add(5))


def test_trained_vectors_are_not_shared():
    """Two plans being trained from one starting point will differ after the first step."""
    a, b = (randn(0, HIDDEN).requires_grad_() for _ in range(2))
    program = fresh({0: fs.Plan([fs.Add(a, layers=0)]), 1: fs.Plan([fs.Add(b, layers=0)])})
    with torch.no_grad():
        b.mul_(2)
    bank, entries, scalars = program.live()
    x = randn(99, 2, HIDDEN)
    tables = program.tables(4)._replace(bank=bank, entries=entries, scalars=scalars)
    result = steer(x, tables, placed([0, 1]))
    torch.testing.assert_close(result, torch.stack([x[0] + a, x[1] + b]))
    result.sum().backward()
    assert torch.equal(a.grad, torch.ones(HIDDEN)) and torch.equal(b.grad, torch.ones(HIDDEN))


def test_live_values_of_numbers():
    c = torch.tensor(2.0, requires_grad=True)
    program = fresh(
        {1: fs.Plan([fs.Add(randn(0, HIDDEN), layers=1), fs.Ablate(randn(1, 2, HIDDEN), strength=c, layers=1)])}
    )
    with torch.no_grad():
        c.fill_(0.5)
    bank, entries, scalars = program.live()
    rows = placed([1] * 3)
    result = steer(randn(99, 3, HIDDEN), program.tables(8)._replace(bank=bank, entries=entries, scalars=scalars), rows)
    now = fresh(
        {1: fs.Plan([fs.Add(randn(0, HIDDEN), layers=1), fs.Ablate(randn(1, 2, HIDDEN), strength=0.5, layers=1)])}
    )
    assert torch.equal(result, steer(randn(99, 3, HIDDEN), now.tables(8), rows))
    result.sum().backward()
    assert c.grad is not None and c.grad != 0


@pytest.mark.parametrize(
    ("slot", "plan", "message"),
    [
        (
            0,
            lambda: add(9, layers=(0, 1), at=("resid_pre", "attn_out", "mlp_out", "resid_mid")),
            r"8 entries.* holds 6.*Capacity\(entries=\.\.\.\)",
        ),
        (0, lambda: ablate(9, 13), r"13 more bank row.* into 12.*Capacity\(vectors=\.\.\.\)"),
        (4, lambda: add(9), "slot 4 is out of range: the program has 4 slots"),
        (-1, lambda: add(9), "slot -1 is out of range: the program has 4 slots"),
        (0, lambda: add(9, layers=2), r"layer 2 is out of range: the model has layers 0\.\.1"),
        (0, lambda: fs.Plan([fs.Add(randn(0, 8), layers=0)]), "hidden size 8, the model has 16"),
    ],
    ids=["entries", "vectors", "slot", "negative_slot", "layer", "hidden"],
)
def test_what_does_not_fit_changes_nothing(slot, plan, message):
    program = fresh({0: add(0), 1: ablate(1, 3)})
    before, plans = snapshot(program), list(program.plans)
    with pytest.raises(ValueError, match=message):
        program.load(slot, plan())
    assert unchanged(program, before, plans)
    program.load(2, ablate(2, 3))  # and the room is still all there
    program.load(3, ablate(3, 3))
    assert torch.equal(outputs(program)[:, 1], outputs(fresh({1: ablate(1, 3)}))[:, 1])


def test_replacing_needs_no_room_for_both():
    program = fresh({0: ablate(0, 12)})
    program.load(0, ablate(1, 12))
    assert torch.equal(outputs(program), outputs(fresh({0: ablate(1, 12)})))


def pool(program: fs.Program) -> SlotPool:
    return SlotPool(program.change, program.plans)


def by_id(*plans: fs.Plan) -> dict[int, fs.Plan]:
    return {id(plan): plan for plan in plans}


class TestSlotPoolAlone:
    def test_holds_these_and_no_others(self):
        a, b, c = add(0), add(1), add(2)
        program = fresh({})
        slots = pool(program)
        assert slots.take(by_id(a, b), alone=True)
        before = slots.slots[id(b)]
        assert slots.take(by_id(c, b), alone=True)
        assert slots.slots[id(b)] == before, "a plan that is held already keeps its slot"
        assert sum(plan is not None for plan in program.plans) == 2
        result = outputs(program)
        for plan in (c, b):
            slot = slots.slots[id(plan)]
            assert torch.equal(result[:, slot], outputs(fresh({slot: plan}))[:, slot])

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (lambda: [ablate(9, 13)], "bank row"),
            (lambda: [ablate(8, 7), ablate(9, 6)], "bank row"),
            (lambda: [add(9, layers=(0, 1), at=("resid_pre", "attn_out", "mlp_out", "resid_mid"))], "entries"),
            (lambda: [add(i) for i in range(4)], r"5 different plans, 4 slots: use a larger Capacity\(slots=\.\.\.\)"),
            (lambda: [add(8), fs.Plan([fs.Add(randn(0, 8), layers=0)])], "hidden size"),
            (lambda: [add(8), fs.Plan([fs.Ablate(torch.zeros(HIDDEN), layers=0)])], "zero"),
        ],
        ids=["vectors", "vectors_together", "entries", "slots", "hidden", "zero_direction"],
    )
    def test_all_or_nothing(self, more, message):
        a, b = add(0), ablate(1, 3)
        program = fresh({})
        slots = pool(program)
        slots.take(by_id(a, b), alone=True)
        held = dict(slots.slots)
        before, plans, result = snapshot(program), list(program.plans), outputs(program)
        with pytest.raises(ValueError, match=message):
            slots.take(by_id(b, *more()), alone=True)
        assert unchanged(program, before, plans) and slots.slots == held
        assert torch.equal(outputs(program), result)
        assert slots.take(by_id(a, b), alone=True) and unchanged(program, before, plans)

    def test_a_slot_that_somebody_else_filled(self):
        a, b = add(0), add(1)
        program = fresh({})
        slots = pool(program)
        slots.take(by_id(a), alone=True)
        program.load(slots.slots[id(a)], b)
        slots.forget([slots.slots[id(a)]])
        slots.take(by_id(a), alone=True)
        assert [plan for plan in program.plans if plan is not None] == [a]


class TestSlotPool:
    def test_the_plan_left_alone_for_longest_goes(self):
        plans = {name: add(i) for i, name in enumerate("abcde")}
        program = fresh({})
        slots = pool(program)
        for name in "abcd":
            assert slots.take({name: plans[name]})
        slots.leave("abcd")
        assert slots.take({"a": plans["a"]}) and slots.take({"e": plans["e"]})
        assert set(slots.slots) == {"a", "c", "d", "e"}
        assert all(program.plans[slot] is plans[name] for name, slot in slots.slots.items())

    def test_who_is_used_stays_and_the_others_wait(self):
        program = fresh({})
        slots = pool(program)
        assert slots.take({i: add(i) for i in range(4)})
        before, plans = snapshot(program), list(program.plans)
        assert not slots.take({9: add(9)})
        assert unchanged(program, before, plans)
        slots.leave([2])
        assert slots.take({9: add(9)}) and set(slots.slots) == {0, 1, 3, 9}

    def test_no_more_go_than_the_room_needs(self):
        program = fresh({})
        slots = pool(program)
        for i, k in enumerate((4, 4, 3)):
            assert slots.take({i: ablate(i, k)})
        slots.leave([0, 1])
        assert slots.take({7: ablate(7, 5)}) and set(slots.slots) == {1, 2, 7}
        assert not slots.take({8: ablate(8, 6)}), "2 and 7 have 8 of 12 rows"
        assert set(slots.slots) == {1, 2, 7}, "nobody goes in vain"
        slots.leave([7])
        assert slots.take({8: ablate(8, 6)}) and set(slots.slots) == {2, 8}

    def test_what_never_fits_is_refused(self):
        program = fresh({})
        slots = pool(program)
        assert slots.take({0: ablate(0, 4)})
        assert not slots.take({1: ablate(1, 13)}), "as long as somebody is in the way, it waits"
        slots.leave([0])
        with pytest.raises(ValueError, match="13 more bank row"):
            slots.take({1: ablate(1, 13)})
        assert set(slots.slots) == {0}

    def test_released_plans_stay_but_for_those_being_trained(self):
        trained = fs.Plan([fs.Add(randn(1, HIDDEN).requires_grad_(), layers=0)])
        program = fresh({})
        slots = pool(program)
        assert slots.take({"a": add(0), "trained": trained})
        slots.release()
        assert set(slots.slots) == {"a"} and trained not in program.plans
        assert slots.take({i: add(i) for i in range(4)}), "nobody uses a"

    def test_what_an_interrupt_left_in_a_slot_is_not_in_the_way(self):
        program = fresh({})

        def interrupted(plans):
            program.change(plans)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            SlotPool(interrupted, program.plans).take({0: ablate(0, 12)})
        slots = pool(program)
        assert slots.take({1: ablate(1, 12)}) and list(slots.slots) == [1]


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_lie_apart_move_together(seed):
    """A plan fits wherever its rows are free in number, and what moves for it does what it did."""
    program = fresh({0: ablate(seed, 3), 1: ablate(seed + 10, 3), 2: ablate(seed + 20, 3), 3: ablate(seed + 30, 3)})
    program.change({0: None, 2: None})
    gate = fs.Gate(randn(seed, HIDDEN), 0.1)
    plan = fs.Plan([fs.Ablate(randn(seed + 40, 5, HIDDEN), layers=0, when=gate)])
    before = outputs(program)
    program.load(0, plan)
    together = outputs(program)
    assert torch.equal(together[:, [1, 3]], before[:, [1, 3]])
    assert torch.equal(together[:, 0], outputs(fresh({0: plan}))[:, 0])


class TestCapacity:
    def test_of_leaves_room_for_as_much_again(self):
        plans = [ablate(0, 3, layers="all"), add(1, layers="all", at=("attn_out", "mlp_out"))]
        program = fs.Program(N_LAYERS, HIDDEN, fs.Capacity.of(plans, N_LAYERS, HIDDEN))
        more = [ablate(2, 3, layers="all"), add(3, layers="all", at=("attn_out", "mlp_out"))]
        program.change(dict(enumerate([*plans, *more])))

    def test_of_nothing_takes_a_vector_of_its_own_everywhere(self):
        every_site = fs.Plan(
            [
                fs.Add(randn(10 * layer + i, HIDDEN), layers=layer, at=at)
                for layer in range(N_LAYERS)
                for i, at in enumerate(("resid_pre", "attn_out", "resid_mid", "mlp_out"))
            ]
        )
        fs.Program(N_LAYERS, HIDDEN, fs.Capacity.of([], N_LAYERS, HIDDEN)).load(0, every_site)


def test_to_another_device_holds_the_same():
    program = fresh({0: add(0), 2: ablate(1, 3)})
    other = program.to("cpu")
    assert torch.equal(outputs(other), outputs(program))
    other.load(0, None)
    assert not torch.equal(outputs(other), outputs(program)), "the copy has tables of its own"


# Interrupted ----------------------------------------------------------------------------------------------------------


class Interrupt(BaseException):
    pass


def interrupted(at: int, change: Callable[[], object]) -> bool:
    """Make a change, interrupted at its `at`-th line of program.py; whether it was."""
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith("faststeer/program.py"):
            return None
        if event == "line":
            count += 1
            if count == at:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        change()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_interrupted_at_any_line_the_next_change_makes_it_right():
    """Whether it changes the same slot or another one; the plans of other slots act as before, shared vectors too."""
    held = {0: add(0, layers="all"), 1: ablate(1, 2), 2: add(2)}
    others = [
        lambda p: p.load(1, fs.Plan([*add(0), *ablate(5, 3, layers=1)])),
        lambda p: p.change({0: held[2], 1: ablate(7, 2), 2: add(0)}),
        lambda p: (p.load(1, None), p.load(1, ablate(5, 9))),  # the other blocks move together
    ]
    for change in others:
        at, wrong = 1, 0
        while True:
            program = fresh(held)
            if not interrupted(at, lambda p=program, c=change: c(p)):
                break
            kept = {slot: plan for slot, plan in enumerate(program.plans) if plan and slot not in program.unfinished}
            wrong += bool(program.unfinished)
            program.load(3, add(9))
            assert not program.unfinished
            assert torch.equal(outputs(program), outputs(fresh(kept | {3: add(9)})))
            change(program)
            done = {slot: plan for slot, plan in enumerate(program.plans) if plan}
            assert torch.equal(outputs(program), outputs(fresh(done)))
            at += 1
        assert at > 50 and wrong > 15


@torch.no_grad()
@pytest.mark.skipif(ops.backend_for("cpu") != "cpu", reason="prepared tables are for the C++ back ends")
def test_a_copy_prepares_its_own_tables():
    """What is prepared holds where the tables lie, and those of a copy lie elsewhere."""
    program, x, rows = fresh({0: add(1, layers="all")}), randn(99, 3, HIDDEN), placed([0] * 3)
    where = site("resid_post", 0)
    before = program.prepared(rows, None).steer(x, where)
    copied = copy.deepcopy(program)
    copied.load(0, add(2, layers="all"))
    assert torch.equal(program.prepared(rows, None).steer(x, where), before)
    assert torch.equal(copied.prepared(rows, None).steer(x, where), steer(x, copied.tables(where), rows))
    assert not torch.equal(copied.prepared(rows, None).steer(x, where), before)
