"""Interrupted at any line of ours (a trace function raises there) and at random moments (a signal handler raises), a
context leaves the model as it was, and everything can be used again. The full profile walks every line event and every
bytecode; the shorter run every line of entering and leaving, first and last time, and a sample of a pass."""

from __future__ import annotations

import dis
import functools
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import faststeer as fs
from faststeer.hf import read
from faststeer.hf.changes import Changes, Context, _half_undone, changing, is_changed
from faststeer.hf.freeze import freeze
from faststeer.hf.hook_points import quiet
from faststeer.hf.known import known_of
from faststeer.hf.row_plans import RowPlans
from faststeer.hf.steering import is_steered
from faststeer.observe import ablate, exchange_attention
from faststeer.program import Program, SlotPool

FULL = os.environ.get("FASTSTEER_TEST_PROFILE") == "full"
OURS = str(Path(fs.__file__).parent)
MODEL, TOKENIZER = fs.demo.load()
INPUTS = dict(fs.hf.tokenize(TOKENIZER, ["How do I bake a cake?", "Tell me a story about the sea."]))
NEW = 2
V = torch.randn(MODEL.config.hidden_size, generator=torch.Generator().manual_seed(0))
ADD = fs.Plan([fs.Add(V, 4.0, layers=1), fs.Add(V, -4.0, layers=2, at="mlp_out", positions="last")])
STRONG = fs.Plan([*ADD, fs.Ablate(V, layers="all", at=("resid_pre", "resid_mid"))])
RICH = fs.Plan([*STRONG, fs.Probe(V, layers=2)])
ENGINE = fs.Engine(MODEL, TOKENIZER, max_batch=2, max_length=64)


class Interrupt(BaseException):
    pass


@torch.no_grad()
def generated() -> torch.Tensor:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    out = MODEL.generate(**INPUTS, **settings, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def passed(_: object) -> torch.Tensor:
    return generated()


def read_by(taken: dict[int, torch.Tensor]) -> torch.Tensor:
    generated()
    return torch.stack([taken[layer] for layer in sorted(taken)])


def hooked() -> Context[None]:
    """`fs.hook`, by a user who takes it away again."""
    module, hook = MODEL.model.layers[2], fs.hook(fs.Add(V, 4.0))
    return Context(lambda changes: changes.hook(module.register_forward_hook, hook))


def engine_run() -> Any:
    return ENGINE.generate(["One two", "three", "four five six"], [STRONG, None, ADD], max_new_tokens=NEW, probe=V)


def by_engine(completions: Any) -> torch.Tensor:
    return torch.stack([completion.projections.sum() for completion in completions])


def forget_plans() -> None:
    """The Engine keeps plans loaded: without them it begins alike each time."""
    for slot in range(ENGINE._steering.capacity.slots):
        ENGINE._steering.load(slot, None)
    ENGINE._slots = SlotPool(ENGINE._steering.change, ENGINE._steering.loaded)


@contextmanager
def closing(iterator: Any) -> Iterator[Any]:
    try:
        yield iterator
    finally:
        iterator.close()


def found_anew() -> fs.Steering:
    """Hook points and fusion, looked for in a model that is not known."""
    known_of(MODEL).structure = None
    return freeze(MODEL, RICH, "ov")


# name: how to make the context, and what is done inside it
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]] = {
    "steer-fused": (lambda: fs.steer(MODEL, RICH, path="fused"), passed),
    "steer-hooks": (lambda: fs.steer(MODEL, [RICH, None], path="hooks"), passed),
    "freeze": (lambda: freeze(MODEL, RICH, "qk"), passed),
    "ablate": (lambda: ablate(MODEL, ADD, ("svv", "mlp")), passed),
    "read": (lambda: read(MODEL, "resid_mid"), read_by),
    "exchange": (lambda: exchange_attention(MODEL, lambda call: call.attend()), passed),
    "find": (found_anew, passed),
    "quiet": (lambda: quiet(MODEL), passed),
    "hook": (hooked, passed),
    "engine": (lambda: closing(engine_run()), by_engine),
}


def run(kind: str, inside: bool = True, within: Callable[[str], object] = lambda phase: None) -> torch.Tensor | None:
    make, act = KINDS[kind]
    within("make")
    manager = make()
    within("enter")
    with manager as context:
        within("pass")
        result = act(context) if inside or kind == "engine" else None
        within("leave")
    return result


@functools.cache
def expected(kind: str) -> torch.Tensor:
    return run(kind)


@functools.cache
def unsteered() -> torch.Tensor:
    return generated()


def state() -> dict[Any, Any]:
    """Everything on the model that a context may touch, by identity; dictionaries with their order."""

    def contents(value: object) -> object:
        return [(key, id(each)) for key, each in value.items()] if isinstance(value, dict) else id(value)

    there: dict[Any, Any] = {"steered": is_steered(MODEL), "changed": any(map(is_changed, MODEL.modules()))}
    configs = {id(config): config for m in MODEL.modules() if (config := getattr(m, "config", None)) is not None}
    for name, owner in [*MODEL.named_modules(), *configs.items()]:
        there[name] = {key: contents(value) for key, value in vars(owner).items()}
    return there


def check(kind: str, before: dict[Any, Any], where: str, whole: bool) -> None:
    now = state()
    different = [name for name in before if now[name] != before[name]]
    assert not different and not _half_undone, f"{where}: {different} are not as before"
    assert torch.is_grad_enabled(), where
    if whole:
        assert torch.equal(generated(), unsteered()), where
        assert torch.equal(run(kind), expected(kind)), where
        assert state() == before, where


# At every line --------------------------------------------------------------------------------------------------------


@functools.cache
def _uninterrupted(code: types.CodeType) -> set[int]:
    """Where CPython looks for no signal, which it does where a function begins, behind a call and where it jumps back:
    not at `try:`, not between the end of a `with` block and the call of `__exit__(None, None, None)`, and not when a
    function returns.
    """
    instructions = list(dis.get_instructions(code))
    offsets = {each.offset for each in instructions if each.opname == "NOP" or each.opname.startswith("RETURN")}
    for i, three in enumerate(zip(instructions, instructions[1:], instructions[2:], strict=False)):
        if all(each.opname == "LOAD_CONST" and each.argval is None for each in three):
            first = i
            while instructions[first - 1].opname in ("NOP", "SWAP"):
                first -= 1
            last = next(j for j in range(i, len(instructions)) if instructions[j].opname == "CALL")
            offsets |= {each.offset for each in instructions[first : last + 1]}
    return offsets


class Tracer:
    """Notes the line events (or bytecodes) in our files at which there may be an interrupt."""

    def __init__(self, opcodes: bool = False) -> None:
        self.opcodes = opcodes
        self.seen: list[tuple[str, str]] = []  # phase and place of every event
        self.offsets: list[tuple[int, int]] = []  # its code object, by identity, and bytecode
        self.phase = ""

    def __call__(self, frame: Any, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if self.is_event(frame, event) and frame.f_lasti not in _uninterrupted(frame.f_code):
            self.seen.append((self.phase, self.place(frame)))
            self.offsets.append((id(frame.f_code), frame.f_lasti))
        return self

    def is_event(self, frame: Any, event: str) -> bool:
        frame.f_trace_opcodes = self.opcodes
        return event == ("opcode" if self.opcodes else "line")

    def place(self, frame: Any) -> str:
        where = f"{frame.f_code.co_filename[len(OURS) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        return f"{where} {frame.f_lasti}" if self.opcodes else where

    def run(self, kind: str, inside: bool) -> None:
        if kind == "engine":
            forget_plans()
        # Not by sys.settrace in this frame, whose own lines are not ours.
        sys.settrace(self)
        try:
            run(kind, inside, functools.partial(setattr, self, "phase"))
        finally:
            sys.settrace(None)


class Interrupting(Tracer):
    """Raises at one of the events of a run. No other function is traced: that would take most of the time."""

    def __init__(self, traced: Tracer, number: int) -> None:
        super().__init__(traced.opcodes)
        self.code, self.offset = traced.offsets[number]
        self.before = traced.offsets[:number].count(traced.offsets[number])

    def __call__(self, frame: Any, event: str, argument: object) -> Any:
        if id(frame.f_code) != self.code:
            return None
        if self.is_event(frame, event) and frame.f_lasti == self.offset:
            if not self.before:
                raise Interrupt(f"{self.phase} {self.place(frame)}")
            self.before -= 1
        return self


def moments(kind: str, inside: bool, opcodes: bool) -> tuple[Tracer, list[int]]:
    """The events of a run, and at which to interrupt: of entering and leaving the first and the last of every place, of
    a pass a sample."""
    first = Tracer(opcodes)
    first.run(kind, inside)
    again = Tracer(opcodes)
    again.run(kind, inside)
    assert first.seen == again.seen and first.offsets == again.offsets
    if FULL:
        return first, list(range(len(first.seen)))
    if inside or kind == "find":
        events = [i for i, (phase, _) in enumerate(first.seen) if phase in ("make", "pass")]
        chosen = set(random.Random(kind).sample(events, min(len(events), 30)))
    else:
        chosen = set()
    if inside == (kind == "engine") and kind != "find":  # the Engine enters and leaves in its iterator
        places = {event: i for i, event in enumerate(first.seen) if _enters(*event)}  # the last of each
        chosen |= {*places.values(), *map(first.seen.index, places)}
    return first, sorted(chosen)


def _enters(phase: str, place: str) -> bool:
    """Whether an event is one of entering or leaving."""
    return phase in ("enter", "leave") or place.startswith(("engine/engine.py", "engine/linear.py", "hf/changes.py"))


@pytest.mark.parametrize("opcodes", [False, pytest.param(True, marks=pytest.mark.full)], ids=["lines", "bytecodes"])
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_at_every_line(kind, inside, opcodes):
    expected(kind), unsteered()
    (traced, chosen), before = moments(kind, inside, opcodes), state()
    for i, at in enumerate(chosen):
        with pytest.raises(Interrupt) as interrupt:
            Interrupting(traced, at).run(kind, inside)
        assert str(interrupt.value) == " ".join(traced.seen[at])
        check(kind, before, str(interrupt.value), whole=FULL or i % 40 == 0 or at == chosen[-1])


# At random moments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_by_signals(kind):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, reference = random.Random(seed), expected(kind)
    before, started = state(), time.perf_counter()
    run(kind)
    span = time.perf_counter() - started
    assert unsteered() is not None and reference is not None

    def interrupt(*_: object) -> None:
        raise rng.choice((KeyboardInterrupt, TimeoutError, Interrupt))

    previous, interrupted = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for i in range(400 if FULL else 30):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, span))
                run(kind, inside=i % 2 == 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (KeyboardInterrupt, TimeoutError, Interrupt):
                interrupted += 1
            torch.set_grad_enabled(True)  # torch.no_grad() itself is not safe: its `__exit__` is written in Python
            check(kind, before, f"seed {seed}, round {i}", whole=i % 10 == 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    check(kind, before, f"seed {seed}", whole=True)
    assert interrupted, f"seed {seed}: no signal came in time"


# More than once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["steer-fused", "steer-hooks", "freeze", "ablate"])
@pytest.mark.parametrize("nth", [0, 1, 2, 3, 6, 9])
def test_interrupted_while_it_is_undone_and_again(kind, nth, monkeypatch):
    """What is left does nothing, and goes with the next pass or the next context."""
    before, undo = state(), Changes.undo

    def interrupted(changes: Changes) -> None:
        """Interrupted behind the nth undo, the first time it is called and the second."""
        changes._undos.insert(len(changes._undos) - nth, raises)
        undo(changes)

    def raises() -> None:
        raise Interrupt

    manager = KINDS[kind][0]()
    with pytest.raises(Interrupt), manager:
        monkeypatch.setattr(Changes, "undo", interrupted)
    monkeypatch.setattr(Changes, "undo", undo)
    changes = manager._changes
    changes._undos = [each for each in changes._undos if each is not raises]
    assert state() != before and not manager.entered and changes in _half_undone
    if nth < 3:
        assert torch.equal(generated(), unsteered())
    else:
        assert torch.equal(run(kind), expected(kind))
    assert state() == before and not _half_undone
    with manager:  # the same one again
        pass
    assert state() == before


def test_what_fails_inside_is_raised_and_undone():
    before = state()
    with pytest.raises(ZeroDivisionError), fs.steer(MODEL, RICH), read(MODEL, "resid_pre"):
        raise ZeroDivisionError
    assert state() == before


def test_contexts_may_be_left_in_any_order():
    before, plain = state(), unsteered()
    first, second, third = fs.steer(MODEL, ADD), fs.steer(MODEL, RICH, path="hooks"), read(MODEL, "resid_mid")
    for order in ([first, second, third], [third, first, second], [second, first, third]):
        first.__enter__(), second.__enter__(), third.__enter__()
        for context in order:
            context.__exit__(None, None, None)
        assert state() == before and torch.equal(generated(), plain)
    with ExitStack() as stack:
        stack.enter_context(first)
        assert first.entered
    assert not first.entered and state() == before


def test_changes_leave_alone_what_somebody_else_has_put_there():
    owner, ours, theirs = torch.nn.Linear(2, 2), lambda x: x, lambda x: -x
    with changing() as changes:
        changes.replace(owner, "forward", ours)
        owner.forward = theirs
    assert owner.forward is theirs


def test_after_an_interrupted_change_of_plans_passes_are_refused_until_it_is_made(monkeypatch):
    """Also when what is interrupted is the table of rows, behind the program."""
    plain, strong, other = fs.Plan([fs.Add(V, 1.0, layers=1)]), STRONG, fs.Plan([fs.Add(V, -1.0, layers="all")])
    with fs.steer(MODEL, [plain, strong]) as steering, torch.no_grad():
        expected = MODEL(**INPUTS).logits
        for place, name in ((Program, "_write_bank"), (Program, "_made_tables"), (RowPlans, "_of_rows")):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    steering.assign([other, plain])
            with pytest.raises(RuntimeError, match=r"change them again, by assign\(...\)"):
                MODEL(**INPUTS)
            steering.assign([plain, strong])
            assert torch.equal(MODEL(**INPUTS).logits, expected)
