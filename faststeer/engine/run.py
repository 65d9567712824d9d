"""The loop over rows: requests wait in a queue, take a row and their plan's slot, draw a token per step, and leave.

The host never waits for a step but to read its tokens, on a GPU one step later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from faststeer.engine.batch import EngineBatch
from faststeer.engine.graphs import Steps
from faststeer.engine.requests import Request, Stops
from faststeer.generator import Completion, FinishReason
from faststeer.hf import Steering
from faststeer.hf.prefix import common_length
from faststeer.ops.tables import POSITION_MIN
from faststeer.program import SlotPool

T = TypeVar("T")
# Of a prefill: tokens of padding that cost less than another pass (the demo model on a CPU), and tokens.
PADDING, PREFILL = 256, 16384
REFILL = 8  # this part of the rows must be free before a prefill interrupts the others
LOOK_AHEAD = 4  # times the rows: requests looked at for one whose plan has a slot


@dataclass(frozen=True)
class _Launched:
    """Tokens on their way to the host, and whose they are."""

    tokens: Tensor
    ready: torch.cuda.Event | None
    requests: list[Request]


class GenerateJob:
    """One call of `generate`."""

    def __init__(
        self,
        batch: EngineBatch,
        steps: Steps,
        ahead: int,
        steering: Steering,
        slots: SlotPool,
        requests: Sequence[Request],
        stops: Stops,
    ) -> None:
        self.batch, self.steps, self.ahead, self.stops = batch, steps, ahead, stops
        self.steering, self.slots = steering, slots
        self.queue = deque(requests)
        self.live: list[Request] = []  # by row
        self.rows = batch.rows  # fewer after running out of memory
        self.pending: deque[_Launched] = deque()
        self.sequences = list(range(batch.rows))
        self.drawn = 0

    def completions(self) -> Iterator[Completion]:
        self.steps.look_again()
        for completion in self._completions():
            yield completion
            self.steps.look_again()

    def _completions(self) -> Iterator[Completion]:
        while self.queue or self.live or self.pending:
            try:
                yield from self._admit()
                if self.live:
                    self._launch(self._step(), self.live)
                    yield from self._collect(self.ahead)
                else:
                    yield from self._collect(0)
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
                yield from self._collect(0)
                self._shrink()

    def close(self) -> None:
        """Empty the rows. Plans stay in their slots."""
        self.batch.steering = None
        for row in range(self.batch.rows):
            self.batch.clear(row)
        self.slots.release()
        self.steering.clear_projections()

    # Rows

    def _admit(self) -> Iterator[Completion]:
        """Fill free rows from the queue, when there are enough for a pass of their own or nothing else runs."""
        free = self.rows - len(self.live)
        if not self.queue or (self.live and free < min(max(1, self.rows // REFILL), len(self.queue))):
            return
        admitted: list[Request] = []
        waiting: list[Request] = []
        while self.queue and len(admitted) < free and len(waiting) < LOOK_AHEAD * self.rows:
            request = self.queue.popleft()
            try:
                fits = self._take_slot(request)
            except ValueError as error:
                yield self._finish(request, "error", error)
                continue
            (admitted if fits else waiting).append(request)
        self.queue.extendleft(reversed(waiting))
        prefills = _shared_prefixes(self.live, admitted)
        while prefills:
            group, leader, prefix = prefills.pop(0)
            if leader is not None and leader not in self.live:  # it has ended, and its row may be another's
                group, rest, prefix = group[:1], group[1:], 0
                if rest:
                    prefills[:0] = _shared_prefixes(group, rest)
            try:
                tokens = self._prefill(group, self.live.index(leader) if prefix else 0, prefix)  # type: ignore[arg-type]
            except torch.OutOfMemoryError:
                for request in (request for rest, _, _ in reversed(prefills) for request in reversed(rest)):
                    self.queue.appendleft(request)
                    self._leave_slot(request)
                raise
            self._launch(tokens, group)
            yield from self._collect(self.ahead)

    def _prefill(self, group: list[Request], source: int, prefix: int) -> Tensor:
        for request in group:
            request.sequence = self.sequences.pop()
            request.launched = len(request.tokens)
        first = len(self.live)
        self.live += group
        return self.batch.prefill(group, first, prefix, source)

    def _step(self) -> Tensor:
        width = 1 + max(len(request.prompt) + request.launched - 1 for request in self.live)
        return self.steps.decode(len(self.live), width, max(request.mode for request in self.live))

    def _launch(self, tokens: Tensor, requests: list[Request]) -> None:
        """Send tokens on their way, and let go of the rows of requests that have drawn their last."""
        ready = None
        if tokens.is_cuda:
            # Graphs write the next step's tokens to the same place.
            tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(_Launched(tokens, ready, list(requests)))
        for request in requests:
            request.launched += 1
        # From the last row on: a row that is the last leaves no gap to be filled.
        for request in reversed([request for request in requests if request.launched >= request.limit]):
            self._release(request)

    def _release(self, request: Request) -> None:
        """Give back a row: what it saw is kept, and the last row takes its place."""
        row, last = self.live.index(request), len(self.live) - 1
        request.projections = self.batch.seen(row, len(request.prompt) + request.launched - 1)
        if row != last:
            length = len(self.live[last].prompt) + self.live[last].launched
            self.batch.move(last, row, min(length, self.batch.length))
            self.live[row] = self.live[last]
        self.live.pop()
        self.batch.clear(last)
        self.sequences.append(request.sequence)
        self._leave_slot(request)

    def _shrink(self) -> None:
        """Out of memory: half the rows, and every live request starts again behind what it has generated."""
        self.rows = max(1, min(self.rows, len(self.live)) // 2)
        for request in reversed(self.live):
            request.launched = len(request.tokens)
            self.queue.appendleft(request)
            self.sequences.append(request.sequence)
            self._leave_slot(request)
        for row in range(len(self.live)):
            self.batch.clear(row)
        self.live.clear()
        self.steering.clear_projections()
        if self.batch.device.type == "cuda":
            torch.cuda.empty_cache()

    # Slots

    def _take_slot(self, request: Request) -> bool:
        """Give a request the slot of its plan; False: it must wait for one that others use."""
        if request.plan is not None:
            if request.key not in self.slots.slots and request.plan.key != request.key:
                raise ValueError(
                    "its plan was changed in place after generate(...) was called: give it a copy of the vector"
                )
            if not self.slots.take({request.key: request.plan}):
                return False
            request.slot = self.slots.slots[request.key]
        return True

    def _leave_slot(self, request: Request) -> None:
        if request.slot >= 0:
            self.slots.leave([request.key])
            request.slot = -1

    # Tokens on the host

    def _collect(self, ahead: int) -> Iterator[Completion]:
        """Read launched tokens, but for the newest `ahead` launches; yield what they end."""
        while len(self.pending) > ahead:
            launched = self.pending.popleft()
            if launched.ready is not None:
                launched.ready.synchronize()
            for request, token in reversed(list(zip(launched.requests, launched.tokens.tolist(), strict=True))):
                if not request.done and (completion := self._read(request, token)) is not None:
                    yield completion

    def _read(self, request: Request, token: int) -> Completion | None:
        """Take a request's next token; its completion, if that ends it."""
        if token < 0:
            why = "is the steering too strong for the model's dtype?" if request.plan else "are its weights finite?"
            completion = self._finish(request, "error", ValueError(f"the logits hold NaN or infinity: {why}"))
            lengths = [len(live.prompt) + live.launched - 1 for live in self.live]
            self.batch.wipe(lengths + [0] * (self.batch.rows - len(lengths)))
            return completion
        self.drawn += 1
        if token in self.stops.tokens:
            return self._finish(request, "stop", stop_token=token)
        request.tokens.append(token)
        stops, fault = _asked(self.stops.found, request.tokens)
        if stops or fault:
            return self._finish(request, "error" if fault else "stop", fault, unread=1)
        if len(request.tokens) >= request.limit:
            return self._finish(request, "length", unread=1)
        return None

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        error: Exception | None = None,
        unread: int = 0,
        stop_token: int | None = None,
    ) -> Completion:
        """`unread`: tokens at the end that were no input of the model."""
        request.done = True
        if request in self.live:
            self._release(request)
        text, fault = _asked(self.stops.text, request.tokens)
        if fault:
            reason, error = "error", error or fault
        seen = request.projections
        if seen is not None:
            seen = seen.cpu()[:, : len(request.prompt) + len(request.tokens) - unread]
            seen = seen.squeeze(2) if seen.shape[2] == 1 else seen
        return Completion(request.index, text or "", request.tokens, request.prompt, seen, reason, error, stop_token)


def _asked(ask: Callable[[list[int]], T], tokens: list[int]) -> tuple[T | None, Exception | None]:
    """What the tokenizer makes of a request's tokens; or its fault, which is this request's trouble alone."""
    try:
        return ask(tokens), None
    except TimeoutError:  # a signal handler's, not the tokenizer's
        raise
    except Exception as fault:
        return None, fault


def _shared_prefixes(live: list[Request], admitted: list[Request]) -> list[tuple[list[Request], Request | None, int]]:
    """What to prefill, in order: groups of requests, the request whose row has their prefix, and how long it is.

    Requests of one plan that begin with the same tokens read them once: a live one, or the first, leads, and the others
    take its keys and values. Only where the plan steers every token of the prefix alike for all of them.
    """
    shared: list[tuple[list[Request], Request | None, int]] = []
    by_plan: dict[int, list[Request]] = {}
    for request in admitted:
        by_plan.setdefault(id(request.plan), []).append(request)
    following: set[int] = set()
    for requests in by_plan.values():
        best: tuple[int, Request, list[Request]] = PADDING, requests[0], []
        leaders = [request for request in live if request.plan is requests[0].plan][:1]
        for leader in [*leaders, requests[0]]:
            followers = [request for request in requests if request is not leader]
            saved = _common_prefix([leader, *followers]) * len(followers)
            best = max(best, (saved, leader, followers), key=lambda candidate: candidate[0])
        saved, leader, followers = best
        following |= {request.index for request in followers}
        if followers:
            prefix = saved // len(followers)
            shared += [(group, leader, prefix) for group in _groups(followers, prefix)]
    return [(group, None, 0) for group in _groups([r for r in admitted if r.index not in following])] + shared


def _common_prefix(requests: list[Request]) -> int:
    """How many tokens these prompts begin with in common, at least one fewer than the shortest has; 0 if their plan
    does not steer them alike: at each position either all of them or none, whichever prompt they stand in."""
    prompts = [request.prompt for request in requests]
    length = common_length(prompts, 1) if len(prompts) > 1 else 0
    last = length - min(map(len, prompts))  # the prefix stands before this position in every prompt
    for intervention in requests[0].plan or ():
        low, high = intervention.position_range
        if not (low >= last or high <= POSITION_MIN or (low <= POSITION_MIN and high >= last)):
            return 0
    return length


def _groups(requests: list[Request], prefix: int = 0) -> list[list[Request]]:
    """Requests that are prefilled together, longest first. Padding stays below an eighth of a group's tokens, or is
    less than another pass costs."""

    def length(request: Request) -> int:
        return len(request.prompt) + len(request.tokens) - prefix

    groups: list[list[Request]] = []
    for request in sorted(requests, key=length, reverse=True):
        group = [*groups[-1], request] if groups else []
        lengths = list(map(length, group))
        total, padding = sum(lengths), sum(lengths[0] - n for n in lengths)
        if group and total <= PREFILL and padding <= PADDING + total // 8:
            groups[-1] = group
        else:
            groups.append([request])
    return groups
