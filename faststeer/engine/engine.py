"""Batched generation at full speed: many prompts, each under its own plan, through a fixed number of rows.

The loop: take requests from the queue into free rows (prompts of similar length together), draw a token for every live
row, hand back what has ended, go on until nothing is left. On a GPU the host reads the tokens of a step while the next
one runs, and steps are CUDA graphs. Whoever needs more machines takes vLLM.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from faststeer import ops
from faststeer.compile import Need, compile_plan
from faststeer.engine.batch import EngineBatch
from faststeer.engine.check import NO_MEMORY, check_logits, vocabulary
from faststeer.engine.graphs import EagerSteps, Graphs, Steps
from faststeer.engine.requests import (
    TOP_K,
    Request,
    Stops,
    per_request,
    read_plans,
    read_prompts,
    read_requests,
)
from faststeer.engine.run import GenerateJob
from faststeer.generator import GREEDY, Completion, SamplingParams
from faststeer.hf import Steering, find_hook_points, steer
from faststeer.hf.batching import Prompt, check_evaluating
from faststeer.hf.changes import Changes, Context, changing, close_at_exit
from faststeer.hf.freeze import freeze as frozen_steering
from faststeer.hf.steering import is_steered
from faststeer.intervention import Direction, Probe
from faststeer.plan import Plan, Plans
from faststeer.program import Capacity, SlotPool
from faststeer.vector import SteeringVector, whole_number

ALONE = "an Engine generates with this model: exhaust or close its iterator before the model is steered elsewhere"


class Engine:
    """High-throughput generation with a plan per request.

        engine = fs.Engine(model, tokenizer, max_batch=64, max_length=512)
        for completion in engine.generate(prompts, plans=plans, max_new_tokens=128):
            print(completion.index, completion.text)

    Keys and values of `max_batch` rows of `max_length` tokens are allocated when the Engine is made. Then it checks
    that its passes give the model's own logits; an architecture for which they do not is refused.

    Args:
        model: a causal language model of transformers on one device, in evaluation mode, with "sdpa" or "eager"
            attention.
        tokenizer: the model's.
        max_batch: rows that run together.
        max_length: tokens of a prompt and its completion together; by default 1024, or what the model has positions for
            if that is less.
        capacity: room for plans that run at the same time; by default it grows with the plans. With fewer slots than
            plans, requests wait for a slot.
        freeze: "qk": the attention pattern is that of the unsteered model, and only the values are steered (see
            `hf.freeze`). A pass then has two rows per request, and the cache is half as large again.

    Raises:
        ValueError: a model in training mode, on several devices, of another attention; numbers out of range; an
            architecture whose logits the engine does not reproduce, or whose attention cannot be frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_batch: int = 64,
        max_length: int | None = None,
        capacity: Capacity | None = None,
        freeze: Literal["qk"] | None = None,
    ) -> None:
        check_evaluating(model)
        if freeze not in (None, "qk"):
            raise ValueError(f"freeze is {freeze!r}: the Engine freezes 'qk' or nothing; hf.freeze knows more")
        _check_model(model)
        config: Any = model.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        rows = whole_number(max_batch)
        length = min(1024, positions or 1024) if max_length is None else whole_number(max_length)
        if rows is None or length is None or rows < 1 or length < 2:
            raise ValueError(
                f"max_batch is {max_batch!r}, max_length {max_length!r}: expected whole numbers, at least 1 and 2"
            )
        if positions is not None and length > positions:
            raise ValueError(f"max_length is {length}, but the model has positions for {positions} tokens")
        self.model, self.tokenizer = model, tokenizer
        self.max_length = length
        self._points = find_hook_points(model)
        self._fixed, self._capacity = capacity is not None, capacity or Capacity(1, 1, 1)
        self._frozen = freeze
        self._steering = self._steering_of(self._capacity)
        self._slots = SlotPool(self._steering.change, self._steering.loaded)
        self._batch = self._fitting(model, rows, length)
        self._busy = False
        on_gpu = self._batch.device.type == "cuda"
        self._steps: Steps = Graphs(self._batch) if on_gpu else EagerSteps(self._batch)
        self._ahead = 1 if on_gpu else 0  # steps launched before the tokens of one are read

    def _steering_of(self, capacity: Capacity) -> Steering:
        if self._frozen is None:
            steering = steer(self.model, Plan(), capacity=capacity)
        else:
            steering = frozen_steering(self.model, Plan(), self._frozen, capacity=capacity)
        steering.alone = ALONE
        return steering

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an Engine cannot be copied or pickled: copy the model, and make another Engine of it")

    def _fitting(self, model: nn.Module, rows: int, length: int) -> EngineBatch:
        """Rows and their cache, checked; half as many until they fit into memory."""
        while True:
            try:
                batch = EngineBatch(model, rows, length, self._frozen is not None)
                check_logits(batch, self._steering)
                return batch
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows //= 2
            except RuntimeError as error:
                if NO_MEMORY not in str(error):
                    raise
                raise ValueError(
                    f"keys and values of {rows} rows of {length} tokens do not fit into memory: make the Engine with a "
                    "smaller max_batch or max_length"
                ) from error

    @property
    def max_batch(self) -> int:
        """Rows that run together: the number passed, or fewer if memory was short."""
        return self._batch.rows

    @property
    def path(self) -> str:
        """How decode steps run: "graphs", captured CUDA graphs that are replayed, or "eager", operator by operator."""
        return self._steps.path

    @property
    def why(self) -> str:
        """Why steps are eager; "" if they are graphs. On a GPU they are graphs until a capture fails."""
        return self._steps.why

    def generate(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        plans: Plans | None = None,
        *,
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] | None = None,
        stop: str | int | Sequence[str | int] = (),
        probe: Direction | None = None,
        rendered: bool = False,
        in_order: bool = True,
        progress: bool | None = None,
    ) -> Iterator[Completion]:
        """Complete every prompt; yield completions while others still run.

        Do not use the model elsewhere until the iterator ends or is closed. After closing it, an exception or Ctrl-C
        the model is as it was before. At Ctrl-C, finished completions are yielded before KeyboardInterrupt is raised.

        Args:
            prompts: texts and chats (the tokenizer's chat template is applied, as everywhere), or lists of token ids.
            plans: one for all, or one (or None) per prompt.
            max_new_tokens: tokens per completion at most; `max_length` may end it sooner.
            temperature: 0: greedy. top_k: draw from the k likeliest tokens; 0: from all. top_p: draw from the smallest
                set of likeliest tokens with this total probability. One number for all or one per prompt. Of the
                model's own generation config only the end-of-sequence tokens are used.
            seed: prompt i draws with seed + i, or with its own seed from a list. A request draws the same tokens alone
                and in any batch. None: a seed from torch's global generator.
            stop: strings and token ids that end a completion, in addition to the end-of-sequence tokens.
            probe: a direction `[hidden]` or directions `[k, hidden]`, each normalised. Their projections are recorded
                at the `resid_pre` of every layer and the `resid_post` of the last; those of a SteeringVector at its
                own hook point and layers. See `Completion.projections`.
            rendered: texts already contain the chat template's marks, and no template is applied.
            in_order: yield in the order of the prompts; False: as they finish.
            progress: show a bar with tokens/s on stderr; by default if stderr is a terminal.

        Raises:
            TypeError, ValueError: wrong arguments, before anything runs: a prompt that is empty or too long, a plan
                that does not fit the model or `capacity`.
            RuntimeError: another iterator of this engine is open, or the model is being steered.

        A later fault of one request (logits that are not finite) ends only that request, with `finish_reason="error"`.
        If memory runs out, the Engine continues with half the rows.
        """
        self._check_free()
        encoded = read_prompts(self.tokenizer, prompts, self.max_length, vocabulary(self.model), rendered=rendered)
        n = len(encoded)
        probes = _probe(probe, self._points.n_layers)
        sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed, stop)
        requests = read_requests(encoded, _watched(read_plans(plans, n), probes), sampling)
        for request in requests:
            request.limit = min(request.limit, self.max_length - len(request.prompt))
        self._make_room([request.plan for request in requests])
        stops = Stops(self.tokenizer, end_tokens(self.model, self.tokenizer), stop)
        shown = sys.stderr.isatty() if progress is None else progress
        return close_at_exit(self._run(requests, stops, probes, in_order, shown))

    def complete(
        self,
        prompts: Sequence[Prompt | Sequence[int]],
        plans: Plans | None = None,
        sampling: SamplingParams = GREEDY,
        *,
        probe: Direction | None = None,
    ) -> Iterator[Completion]:
        """`generate` as a `faststeer.generator.Generator`: completions as they end, no progress bar."""
        return self.generate(prompts, plans, probe=probe, in_order=False, progress=False, **vars(sampling))

    def warmup(
        self,
        plans: Plans | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        probe: Direction | None = None,
    ) -> None:
        """Compile and capture before the first `generate`, so that the first answers are as fast as the later ones.

        On CUDA: compile Triton's kernels if they are used, read a prompt of one token under each plan, and capture the
        graphs of all row counts and lengths, which are powers of two (28 graphs for 64 rows of 1,024 tokens). On a CPU
        nothing is compiled or captured; only the prompt is read, which takes as long as a step or two.

        Args:
            plans: the plans that will be used, as in `generate`, or plans with as many layers, interventions and
                vectors. Room is made for them, and they stay loaded. A later plan that needs more is captured again.
            temperature, top_k, top_p, probe: as in `generate`. Greedy steps, steps with a temperature, steps with
                top-k or top-p, and each number of probed directions have their own graphs.

        Raises:
            TypeError, ValueError, RuntimeError: as `generate`.
            torch.OutOfMemoryError: the graphs do not fit: make an Engine with a smaller `max_batch`.
        """
        self._check_free()
        n = len(plans) if isinstance(plans, Sequence) else 1
        if not n:
            raise ValueError("plans is an empty list: expected at least one plan or None, or no plans at all")
        probes = _probe(probe, self._points.n_layers)
        listed = {id(plan): plan for plan in _watched(read_plans(plans, n), probes)}
        temperature = per_request(temperature, 1, "temperature", 0.0, 1e6)[0]
        top_k, top_p = per_request(top_k, 1, "top_k", 0, TOP_K)[0], per_request(top_p, 1, "top_p", 1e-9, 1.0)[0]
        limit = min(2, self.max_length - 1)
        requests = [
            Request(i, [0], plan, plan and plan.key, limit, temperature, top_k, top_p, 0)
            for i, plan in enumerate(listed.values())
        ]
        self._make_room([request.plan for request in requests])
        ops.warmup(
            self._points.hidden_size,
            self._batch.dtype,
            self._batch.device,
            ("steer", "add_steer", "add_steer_rmsnorm", "latch_"),
        )
        with changing() as changes, self._steering, self._batch.linears:
            # What goes wrong under a plan is told again where it is asked for.
            deque(self._begin(changes, requests, Stops(self.tokenizer, (), ()), probes).completions(), 0)
            self._steps.warm_up(requests[0].mode)

    def _make_room(self, plans: Sequence[Plan | None]) -> None:
        """Make a steering that holds as many of these plans as can be live together."""
        needs: dict[int, Need] = {}
        for i, plan in enumerate(plans):
            if plan is None or id(plan) in needs:
                continue
            try:
                entries = compile_plan(plan, self._points.n_layers, self._points.hidden_size)
                self._steering.check(plan)
            except ValueError as error:
                raise ValueError(f"plans[{i}]: {error}") from error
            need = needs[id(plan)] = Need.of([entries])
            if self._fixed and (need.vectors > self._capacity.vectors or need.entries > self._capacity.entries):
                raise ValueError(
                    f"plans[{i}] needs {need.vectors} vectors and {need.entries} entries, the engine was given "
                    f"{self._capacity}: use a larger capacity"
                )
        slots = min(len(needs), self.max_batch)
        largest = sorted((need.vectors for need in needs.values()), reverse=True)
        needed = slots, sum(largest[:slots]), max((need.entries for need in needs.values()), default=0)
        have = dataclasses.astuple(self._capacity)
        if not self._fixed and any(n > h for n, h in zip(needed, have, strict=True)):
            self._steering = self._steering_of(Capacity(*map(max, needed, have)))
            self._slots = SlotPool(self._steering.change, self._steering.loaded)
            self._capacity = self._steering.capacity

    def _check_free(self) -> None:
        if self._busy:
            raise RuntimeError("this engine is generating already: exhaust or close the other iterator first")
        if is_steered(self.model):
            raise RuntimeError(
                "the model is being steered: leave that context and give plans= to generate; if it is another Engine "
                "that generates with this model, exhaust or close its iterator first"
            )
        check_evaluating(self.model)
        _check_model(self.model)
        if find_hook_points(self.model) != self._points:
            raise RuntimeError("the model's layers have changed since this Engine was made: make another one")
        weight: Any = self.model.get_input_embeddings().weight  # type: ignore[operator]
        if (weight.dtype, weight.device) != (self._batch.dtype, self._batch.device):
            raise RuntimeError(
                f"the model is in {weight.dtype} on {weight.device} now, and this Engine was made for "
                f"{self._batch.dtype} on {self._batch.device}: make another one"
            )

    def _run(
        self, requests: list[Request], stops: Stops, probes: list[Probe], in_order: bool, shown: bool
    ) -> Generator[Completion, None, None]:
        self._check_free()
        held: dict[int, Completion] = {}
        following = 0
        with (
            changing() as changes,
            self._steering,
            self._batch.linears,
            _Bar(len(requests)) if shown else nullcontext() as advance,
        ):
            run = self._begin(changes, requests, stops, probes)
            try:
                for completion in run.completions():
                    if advance is not None:
                        advance(run.drawn)
                    if not in_order:
                        yield completion
                        continue
                    held[completion.index] = completion
                    while following in held:
                        yield held.pop(following)
                        following += 1
            except KeyboardInterrupt:
                yield from (held[index] for index in sorted(held))
                raise

    def _begin(
        self, changes: Changes, requests: Sequence[Request], stops: Stops, probes: Sequence[Probe]
    ) -> GenerateJob:
        """A run of these requests, until `changes` are undone."""
        changes.on_undo(setattr, self, "_busy", False)
        self._busy = True
        if self._steering.unfinished:  # an earlier call was interrupted as it loaded a plan
            self._steering.change({})
        run = GenerateJob(self._batch, self._steps, self._ahead, self._steering, self._slots, requests, stops)
        changes.on_undo(run.close)
        self._batch.steering = self._steering
        entries = compile_plan(Plan(probes), self._points.n_layers, self._points.hidden_size)
        sites = [entry.site for entry in entries]
        self._batch.watch(sites, entries[0].basis.shape[0] if entries else 0)
        return run


class _Bar(Context["_Bar"]):
    """A progress bar with tokens/s on stderr: called with the tokens drawn so far after each completion."""

    def __init__(self, total: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self._bar = Progress(TextColumn("Generating"), *columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=total, rate="")
        self._started = time.perf_counter()

    def enter(self, changes: Changes) -> _Bar:
        changes.on_undo(self._bar.stop)
        self._bar.start()
        return self

    def __call__(self, tokens: int) -> None:
        rate = tokens / (time.perf_counter() - self._started)
        self._bar.update(self._task, advance=1, rate=f"{rate:,.0f} tokens/s")


# Arguments ------------------------------------------------------------------------------------------------------------


def _probe(direction: Direction | None, n_layers: int) -> list[Probe]:
    if direction is None:
        return []
    if isinstance(direction, SteeringVector):
        return [Probe(direction)]
    return [
        Probe(direction, layers="all", at="resid_pre"),
        Probe(direction, layers=n_layers - 1, at="resid_post"),
    ]


def _watched(plans: Sequence[Plan | None], probes: Sequence[Probe]) -> list[Plan | None]:
    """The same plans with probes behind what they do; those that are one object stay one."""
    if not probes:
        return list(plans)
    by_id = {id(plan): Plan([*(plan or ()), *probes]) for plan in plans}
    return [by_id[id(plan)] for plan in plans]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """End-of-sequence tokens: those of the model's generation config, else the tokenizer's."""
    for source in (getattr(model, "generation_config", None), tokenizer):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            return torch.as_tensor(ends, device="cpu").reshape(-1).tolist()  # a number, several, or a tensor of them
    return []


def _check_model(model: Any) -> None:
    """Raise ValueError for a model that the Engine cannot run as it is now."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        raise ValueError(
            f"the model is on {', '.join(sorted(map(str, devices)))}: the Engine runs on one device; load the model "
            "without device_map, or use model.generate under faststeer.steer"
        )
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f'the model\'s attention is {attention!r}: the Engine needs "sdpa" (or "eager"); load the model with '
            'attn_implementation="sdpa"'
        )
    if torch.is_autocast_enabled(next(iter(devices)).type):
        raise ValueError(
            "torch.autocast is on: the Engine keeps keys and values in the model's own dtype; leave autocast, and load "
            "the model in the dtype that it is to run in"
        )
