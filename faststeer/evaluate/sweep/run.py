"""Running a sweep: what is missing in the store is claimed unit by unit, done, and written row by row.

Any number of processes may run the same sweep over the same store; each takes what no other works on.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from faststeer.artefacts import fingerprint
from faststeer.compile import compile_plan
from faststeer.evaluate.generate import generator, seconds_per_answer
from faststeer.evaluate.judging import make
from faststeer.evaluate.multiple_choice import multiple_choice
from faststeer.evaluate.side_effects import text_effects
from faststeer.evaluate.sweep.description import Setting, Sweep, text_digest
from faststeer.evaluate.sweep.projections import packed, project, watched
from faststeer.evaluate.sweep.store import LEASE, Store
from faststeer.generator import SamplingParams
from faststeer.hf import find_hook_points
from faststeer.hf.batching import TokenRow, check_evaluating, encode, padding_id
from faststeer.plan import Plan
from faststeer.progress import forecast, progress_bar
from faststeer.version import versions

CHUNK_BATCHES = 16  # batches in a unit: its last batch, which runs half empty, costs a sixteenth at most
SETTINGS_PER_UNIT = 16  # of side effects
BAND = 16  # tokens: prompts whose lengths differ by less run together
JUDGED_AT_ONCE = 256  # answers between two writes of verdicts
READ_AT_ONCE = 32  # answers of a setting that are projected in one pass
BYTES_PER_TOKEN, BYTES_PER_ROW = 10, 300  # of text and token ids; of everything else, a verdict included


class SweepRow(NamedTuple):
    setting: int
    prompt: int


class Unit(NamedTuple):
    """A piece of the work that one process does: what it needs done before, what to say meanwhile, and how it is
    done."""

    needs: str | None
    doing: str
    do: Callable[[], None]


@dataclass
class Progress:
    """How far a run is: rows answered by anyone, of how many, and what is being done."""

    answered: int
    total: int
    doing: str


def run(
    sweep: Sweep,
    model: Any,
    tokenizer: Any,
    store: Store,
    *,
    max_batch: int = 256,
    engine: Callable[..., Any] | None = None,
    progress: bool | Callable[[Progress], None] = True,
) -> str:
    """Do what is missing of a sweep, and return the run's digest, by which the store knows it.

    Answers come from one generator, rows of any plan mixed in a batch, the longest prompts first;
    then judges, then side effects and projections. Every answer is on disk before the next is waited for (with
    `engine: vllm` every group of four batches).

    Args:
        model, tokenizer: the steered ones.
        store: an open one; several processes may have the same file open.
        max_batch: rows that are answered together.
        engine: for a sweep with `engine: vllm` what makes the engine that answers: `faststeer.vllm.runner.VllmEngine`.
        progress: a bar with the time left on stderr, or a function to call.

    Raises:
        ImportError: the sweep asks for vLLM, and it is not installed.
        ValueError: an engine that the sweep does not ask for, or none where it does; a plan that does not fit the
            model, a prompt that is too long, an unknown judge, a judge's model that is missing, more than the disk has
            room for; all before anything runs.
        OSError: the disk is full; what was finished is kept.
    """
    if (sweep.engine == "vllm") != (engine is not None):
        argument = "no engine=" if engine is None else f"engine={engine!r}"
        raise ValueError(
            f"the sweep has engine: {sweep.engine}, and run is given {argument}: with engine: vllm, and only then, "
            "give engine=faststeer.vllm.runner.VllmEngine"
        )
    check_evaluating(model)
    work = _Work(sweep, model, tokenizer, store, max_batch, engine)
    if progress is True:
        work.forecast()
    with _shown(progress, len(work.rows)) as report, _heartbeat(store):
        try:
            work.do_all(report)
        finally:
            store.release()
            work.close()
    return work.run


class _Work:
    """A sweep on a model: its rows in order, its units, and what each of them takes."""

    def __init__(self, sweep: Sweep, model: Any, tokenizer: Any, store: Store, max_batch: int, engine: Any) -> None:
        self.make_engine = engine
        self.sweep, self.model, self.tokenizer, self.store, self.max_batch = sweep, model, tokenizer, store, max_batch
        self.settings: tuple[Setting, ...] = sweep.settings
        self.prompts = [prompt.prompt for prompt in sweep.prompts]
        _check_plans(model, self.settings)
        self.encoded = encode(tokenizer, self.prompts, sweep.system)
        self.length = _check_lengths(model, self.encoded, [p.id for p in sweep.prompts], sweep.max_new_tokens)
        steered = {"model": model, "tokenizer": tokenizer, "system": sweep.system}
        judges = [make(what, **steered) for what in sweep.judges]
        self.judges = {text_digest(judge.identity): judge for judge in judges}
        self.rows = _largest_first(len(self.settings), [len(ids) for ids in self.encoded])
        self.projected = min(sweep.projections, len(self.prompts))
        n_layers = find_hook_points(model).n_layers
        self.watched, self.direction = watched(self.settings, n_layers)
        maps = self.projected * (len(self.direction) + len(self.watched))
        room = maps * 2 * (n_layers + 1) * self.length
        _check_disk(store, len(self.rows), sweep.max_new_tokens, len(self.judges), room)
        self.run = sweep.identity(fingerprint(model))
        chunk = max(CHUNK_BATCHES * max_batch, 1)
        chunk = store.begin(self.run, chunk, sweep, versions())
        self.chunks = [self.rows[start : start + chunk] for start in range(0, len(self.rows), chunk)]
        facts = [(digest, judge.name, judge.shows, judge.identity) for digest, judge in self.judges.items()]
        directions = [(number, *direction[:3]) for number, direction in enumerate(self.watched)]
        store.add(self.run, judges=facts, directions=directions)
        self.units = self._units()
        store.add_units(self.run, {name: unit.needs for name, unit in self.units.items()})
        self._engine: Any = None
        self._text = cache(lambda token: tokenizer.decode([token]))  # answers share most of their tokens
        self._report: Callable[[int, str], None] = lambda answered, doing: None

    def _units(self) -> dict[str, Unit]:
        """The pieces of the work by name, in their order."""
        chunks = range(len(self.chunks))
        units = {f"answers:{n}": Unit(None, "Answering", partial(self._answer, n)) for n in chunks}
        for n in chunks:
            for digest, judge in self.judges.items():
                doing = f"Judging: {judge.name}"
                units[f"judge:{digest}:{n}"] = Unit(f"answers:{n}", doing, partial(self._judge, digest, n))
        for name, on, measure in (
            ("text", self.sweep.text, self._text_effects),
            ("questions", self.sweep.questions, self._questions),
        ):
            effect = f"{name}-{text_digest(repr(on))[:16]}"
            blocks = range(-(-len(self.settings) // SETTINGS_PER_UNIT) if on else 0)
            units |= {f"effect:{effect}:{n}": Unit(None, "Side effects", partial(measure, effect, n)) for n in blocks}
        for n in chunks:
            if any(row.prompt < self.projected for row in self.chunks[n]):
                name = f"projections:{self.projected}:{n}"
                units[name] = Unit(f"answers:{n}", "Projections", partial(self._project, n))
        return units

    def forecast(self) -> None:
        """Say how long answering will take at most, if no answer ends early."""
        left = len(self.rows) - self.store.count("answers", self.run)
        if not left or self.make_engine is not None:
            return
        options: dict[str, Any] = {"system": self.sweep.system, "max_new_tokens": self.sweep.max_new_tokens}
        options["batch_size"] = self.max_batch
        seconds = left * seconds_per_answer(self.model, self.tokenizer, self.prompts, left, **options)
        less = "Fewer settings or prompts (limit:), or a smaller max_new_tokens, take less"
        forecast(f"{left} answers of {self.sweep.max_new_tokens} tokens at most", seconds, less)

    def do_all(self, report: Callable[[int, str], None]) -> None:
        """Claim and do units until all are done; wait for those that other processes work on."""
        self._report = report
        self._say("Answering")
        while not self.store.finished(self.run, self.units):
            name = self.store.claim(self.run, self.units)
            if name is None:
                self._say("Waiting for other processes")
                time.sleep(0.2)
                continue
            self._say(self.units[name].doing)
            self.units[name].do()
            self.store.finish(self.run, name)

    def _say(self, doing: str) -> None:
        self._report(self.store.count("answers", self.run), doing)

    def _answer(self, number: int) -> None:
        """Answer a chunk. One that was begun is answered again from its start until nothing of it is missing: rows
        round as the rows beside them make them, and so the same rows stand beside each other whatever was killed."""
        rows, there = self.chunks[number], self.store.answered(self.run, number)
        missing = {i for i, row in enumerate(rows) if row not in there}
        if not missing:
            return
        count = self.store.count("answers", self.run)
        total = count + len(missing)
        sweep, engine = self.sweep, self._the_engine()
        sampling = SamplingParams(
            sweep.max_new_tokens,
            sweep.temperature,
            sweep.top_k,
            sweep.top_p,
            # The same numbers are drawn for a prompt under every setting: settings differ by what they do, not by luck.
            seed=[sweep.seed + row.prompt for row in rows],
        )
        prompts, plans = [self.encoded[row.prompt] for row in rows], [self.settings[row.setting].plan for row in rows]
        completions: Any = engine.complete(prompts, plans, sampling)
        with closing(completions):
            for completion in completions:
                if completion.index not in missing:
                    continue
                error = None if completion.error is None else str(completion.error)
                ids = np.asarray(completion.token_ids, dtype="<i4")
                answer = completion.text, ids.size, ids.tobytes(), completion.finish_reason, error
                self.store.add(self.run, answers=[(*rows[completion.index], number, *answer)])
                missing.remove(completion.index)
                self._report(total - len(missing), "Answering")
                if not missing:
                    break

    def _the_engine(self) -> Any:
        """What answers: what `run` was given, which is told all plans beforehand, or this model's `generator`."""
        if self._engine is None:
            size: dict[str, Any] = {"max_batch": self.max_batch, "max_length": self.length}
            if self.make_engine is None:
                self._engine = generator(self.model, self.tokenizer, **size)
            else:
                plans = [setting.plan for setting in self.settings]
                self._engine = self.make_engine(self.model, self.tokenizer, plans, **size)
        return self._engine

    def close(self) -> None:
        """End what runs in processes of its own."""
        if self._engine is not None and self.make_engine is not None:
            self._engine.close()

    def _judge(self, digest: str, number: int) -> None:
        judge = self.judges[digest]
        left = self.store.unjudged(self.run, digest, number)
        for start in range(0, len(left), JUDGED_AT_ONCE):
            some = left[start : start + JUDGED_AT_ONCE]
            prompts = [self.prompts[prompt] for _, prompt, _ in some]
            plans = [self.settings[setting].plan for setting, _, _ in some]
            verdicts = judge(prompts, [text for _, _, text in some], plans)
            rows = [
                (digest, setting, prompt, verdict.label, verdict.score, dict(verdict.parts) or None, verdict.raw)
                for (setting, prompt, _), verdict in zip(some, verdicts, strict=True)
            ]
            self.store.add(self.run, verdicts=rows)

    def _project(self, number: int) -> None:
        """Setting by setting, so that what rounds together is the same whatever came before."""
        by_setting: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for setting, prompt, ids in self.store.unprojected(self.run, number, self.projected):
            by_setting[setting].append((prompt, ids))
        projections: list[tuple[Any, ...]] = []
        tokens: list[tuple[Any, ...]] = []
        for setting, answers in by_setting.items():
            own = [self.direction[setting]] if setting in self.direction else []
            numbers = own if setting else range(len(self.watched))  # the unsteered answers on every direction
            if not numbers:
                continue
            values = project(
                self.model,
                self.settings[setting].plan,
                [TokenRow(self.encoded[prompt], ids) for prompt, ids in answers],
                torch.stack([self.watched[n].direction for n in numbers]),
                pad_id=padding_id(self.tokenizer),
                batch_size=READ_AT_ONCE,
            )
            for (prompt, ids), maps in zip(answers, values, strict=True):
                texts = [self._text(token) for token in (*self.encoded[prompt], *ids)]
                tokens.append((setting, prompt, len(self.encoded[prompt]), texts))
                projections += [(setting, prompt, n, *packed(maps[..., k])) for k, n in enumerate(numbers)]
        self.store.add(self.run, tokens=tokens, projections=projections)

    def _block(self, number: int) -> tuple[range, list[Plan | None]]:
        """The settings of a block of side effects, by number, and their plans."""
        first = number * SETTINGS_PER_UNIT
        numbers = range(first, min(first + SETTINGS_PER_UNIT, len(self.settings)))
        return numbers, [self.settings[n].plan for n in numbers]

    def _text_effects(self, name: str, block: int) -> None:
        numbers, plans = self._block(block)
        effects = text_effects(self.model, self.tokenizer, plans, self.sweep.text)
        rows = [
            (name, number, item, effect.kl[item], effect.cross_entropy[item], effect.tokens[item], None)
            for number, effect in zip(numbers, effects, strict=True)
            for item in range(len(self.sweep.text))
        ]
        self.store.add(self.run, effects=rows)

    def _questions(self, name: str, block: int) -> None:
        (numbers, plans), questions = self._block(block), self.sweep.questions
        accuracies: Any = multiple_choice(self.model, self.tokenizer, questions, plans, system=self.sweep.system)
        rows = [
            (name, number, item, None, None, None, int(choice.chosen == question.answer))
            for number, accuracy in zip(numbers, accuracies, strict=True)
            for item, (question, choice) in enumerate(zip(questions, accuracy.choices, strict=True))
        ]
        self.store.add(self.run, effects=rows)


def _largest_first(n_settings: int, lengths: Sequence[int]) -> list[SweepRow]:
    """Longest prompts first, so that what does not fit into memory fails at the start; among those of a band of similar
    lengths, a setting's rows together, so that they share a slot and the beginning of their prompts."""
    rows = (SweepRow(setting, prompt) for setting in range(n_settings) for prompt in range(len(lengths)))
    return sorted(rows, key=lambda row: (-(lengths[row.prompt] // BAND), row))


# Checks before anything runs ------------------------------------------------------------------------------------------


def _check_plans(model: Any, settings: Sequence[Setting]) -> None:
    points = find_hook_points(model)
    for setting in settings:
        if setting.plan is not None:
            try:
                compile_plan(setting.plan, points.n_layers, points.hidden_size)
            except ValueError as error:
                raise ValueError(f"the setting {setting.name!r} does not fit the model: {error}") from error


def _check_lengths(model: Any, encoded: Sequence[Sequence[int]], ids: Sequence[str], new: int) -> int:
    """Tokens of the longest prompt and its answer."""
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    length = len(encoded[longest]) + new
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"the prompt {ids[longest]!r} has {len(encoded[longest])} tokens, which with max_new_tokens {new} is more "
            f"than the model's {positions} positions: shorten it, or lower max_new_tokens"
        )
    return length


def _check_disk(store: Store, rows: int, new: int, judges: int, more: int) -> None:
    needed = rows * (new * BYTES_PER_TOKEN + BYTES_PER_ROW * (1 + judges)) + more
    free = shutil.disk_usage(store.path.parent).free
    if needed > free:
        raise ValueError(
            f"{rows:,} rows may need {needed / 1e9:.1f} GB, and the disk of {store.path} has {free / 1e9:.1f} GB free: "
            "make room, name a store on another disk, or sweep less"
        )


# While it runs --------------------------------------------------------------------------------------------------------


@contextmanager
def _heartbeat(store: Store) -> Iterator[None]:
    """Signs of life from a thread with a connection of its own, since one row may take long."""
    stop = threading.Event()

    def beat() -> None:
        with Store(store.path, create=False) as own:
            own.worker = store.worker
            while not stop.wait(LEASE / 10):
                try:
                    own.beat()
                except OSError:
                    continue  # the next row will say it

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _shown(progress: bool | Callable[[Progress], None], total: int) -> Iterator[Callable[[int, str], None]]:
    if not isinstance(progress, bool):
        yield lambda answered, doing: progress(Progress(answered, total, doing))
    else:  # the rows of a batch end at about the same time
        with progress_bar("Answering", total, progress, least=total // 4 + 1) as advance:
            yield lambda answered, doing: advance(doing, answered)
