"""One worker's steering: which requests have which plan, which plan is in which slot, and which row of a step belongs
to which request. Attached to vLLM's worker and model runner on their instances; all of it is host work between two
steps, and no step waits for it.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faststeer.compile import compile_plan, probed_columns
from faststeer.ops import backend_for, warmup
from faststeer.ops.tables import EntryKind
from faststeer.plan import Plan, site_name
from faststeer.program import SlotPool
from faststeer.vllm.dose import measure_norms
from faststeer.vllm.fresh_blocks import FreshBlocks
from faststeer.vllm.layers import StepTables, find_layers, patch_layers
from faststeer.vllm.overflow import StepSums, final_states
from faststeer.vllm.packed_projections import Packed, Projections, merged, pack
from faststeer.vllm.requests import Wire, received
from faststeer.vllm.settings import ServerSettings
from faststeer.vllm.switch import CONFIG_KEY, NEW_BLOCKS_KEY
from faststeer.vllm.tables import make_program, sites_of
from faststeer.vllm.wrapping import wrap

logger = logging.getLogger(__name__)

VERSION = 3  # of what is built into a model: part of the key of vLLM's compiled artefacts
KEPT_PROJECTIONS = 1024  # requests
KEPT_PLANS = 4096  # plans that no request holds now, so that they need not be read again


@dataclass
class Running:
    """A request with a plan."""

    plan: LoadedPlan
    prompt_length: int
    sequence: int  # its column of gate_state, -1 where its plan has no latched gate


@dataclass(frozen=True)
class LoadedPlan:
    digest: str
    plan: Plan
    probed: dict[int, int]  # site -> columns
    latches: bool

    @classmethod
    def of(cls, wire: Wire, n_layers: int, hidden_size: int) -> LoadedPlan:
        plan = Plan.from_json(wire.plan)
        entries = compile_plan(plan, n_layers, hidden_size)
        return cls(wire.digest, plan, probed_columns(entries), any(entry.kind == EntryKind.LATCH for entry in entries))


@dataclass(frozen=True)
class PassLayout:
    """Which rows of a pass are whose: the same from one step of decoding to the next, but for their positions.

    Attributes:
        request_ids, counts: the requests in the order of their rows, and how many each has.
        offsets: `[rows]`: a row's position less the tokens that its request had before the step.
        probed: of the requests that are probed: number, id, first row, end.
    """

    request_ids: list[str]
    counts: list[int]
    offsets: np.ndarray
    probed: list[tuple[int, str, int, int]]


class WorkerSteering:
    """The steering of one worker.

    Attributes:
        requests: those with a plan that the worker knows, by id.
        pool: which slot each plan has, by its digest.
    """

    def __init__(self, worker: Any, settings: ServerSettings) -> None:
        config = worker.vllm_config
        self.worker, self.settings = worker, settings
        text = config.model_config.hf_text_config
        self.n_layers, self.hidden_size = int(text.num_hidden_layers), int(text.hidden_size)
        scheduler = config.scheduler_config
        sizes = getattr(config.compilation_config, "cudagraph_capture_sizes", None) or [0]
        self.max_rows = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, *sizes)
        self.n_slots = min(settings.max_plans or scheduler.max_num_seqs, scheduler.max_num_seqs)
        # Those that run, and those that were preempted: with priorities they may be many, and a byte each is little.
        self.n_sequences = 256 * scheduler.max_num_seqs if settings.latched_gates else 0
        # Tensor-parallel ranks have the same residual stream, and see the same.
        self.keeps_projections = worker.rank % config.parallel_config.tensor_parallel_size == 0
        self.requests: dict[str, Running] = {}
        self.plans: OrderedDict[str, LoadedPlan] = OrderedDict()
        self.norms: dict[int, float] = {}  # see `dose`
        self.tables: StepTables
        self.pool: SlotPool
        self.probes: Probes
        self._free_sequences = list(range(self.n_sequences))
        self._rows_in_use = 0  # rows of the device's table that may hold a slot
        self._scheduled: set[str] = set()  # requests in this step
        self._stepping: set[str] = set()  # those of them that have a plan
        self._in_use: dict[Hashable, Plan] = {}  # this step's plans, by digest
        self._computed: dict[str, int] = {}  # tokens of each before this step's
        self._rows: tuple[list[str], list[int]] = [], []  # of this step's pass: requests, how many each has
        self._sums: StepSums | None = None  # of the pass that is not sampled from yet
        self._layout: PassLayout | None = None  # what the device's table holds, while it still holds

    # Building in

    def build(self, runner: Any) -> None:
        """Allocate the tables and build steering into the model that the runner has loaded."""
        target = self.worker.device or torch.device("cpu")
        program = make_program(self.settings, self.n_layers, self.hidden_size, self.n_slots, target)
        layers = find_layers(runner.get_model())
        rows = torch.zeros(3, self.max_rows, dtype=torch.int32, device=target)
        rows[0] = -1
        gate_state = None
        if gates := self.settings.latched_gates:
            gate_state = torch.zeros(gates, self.n_sequences, dtype=torch.bool, device=target)
        probes = {}
        if columns := self.settings.probe_columns:
            # What enters a layer is what left the one before, and is seen there.
            sites = sites_of(self.settings, self.n_layers)
            probed = [s for s in sites if (max(s - 4, 0) if s % 4 == 0 else s) // 4 in layers]
            probes = {s: torch.zeros(self.max_rows, columns, device=target) for s in probed}
        self.tables, self.pool = StepTables(program, rows, gate_state, probes), SlotPool(program.change, program.plans)
        self.fresh_blocks = FreshBlocks(runner)
        self.probes = Probes(self.tables, self.n_layers, self.settings.max_projection_bytes)
        if self.settings.max_dose is not None:  # before the tables, which may have room for fewer tokens, are read
            self.norms = measure_norms(runner.get_model(), self.worker.vllm_config, torch.device(target))
        patch_layers(layers, self.tables, self.settings.hook_points, self.n_layers)  # type: ignore[arg-type]
        if hasattr(runner, "model_memory_usage"):
            runner.model_memory_usage += self.bytes
        self._wrap(runner)
        warmup(self.hidden_size, self.worker.vllm_config.model_config.dtype, target, ("steer", "steer_pair_", "latch_"))

    @property
    def bytes(self) -> int:
        """Of the tables."""
        program = self.tables.program
        tensors = [program.bank, program.entries, program.ranges, self.tables.rows]
        tensors += [*self.tables.probes.values(), *([] if self.tables.gate_state is None else [self.tables.gate_state])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _wrap(self, runner: Any) -> None:
        """Learn the order of rows from the runner, and forget them before it runs without requests."""
        if hasattr(runner, "_prepare_inputs"):  # V1

            def prepare_v1(prepare: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
                prepared = prepare(scheduler_output, *args, **kwargs)
                ids = list(runner.input_batch.req_ids)
                self.map_rows(ids, [scheduler_output.num_scheduled_tokens[i] for i in ids])
                return prepared

            wrap(runner, "_prepare_inputs", prepare_v1)
        elif hasattr(runner, "prepare_inputs"):  # V2

            def prepare_v2(prepare: Any, *args: Any, **kwargs: Any) -> Any:
                batch = prepare(*args, **kwargs)
                self.map_rows(list(batch.req_ids), [int(n) for n in batch.num_scheduled_tokens])
                return batch

            wrap(runner, "prepare_inputs", prepare_v2)
        else:
            raise RuntimeError(f"{type(runner).__name__} is no model runner that faststeer knows")

        def dummy_run(dummy: Any, *args: Any, **kwargs: Any) -> Any:
            self.map_rows([], [])
            return dummy(*args, **kwargs)

        wrap(runner, "_dummy_run", dummy_run)

    # A step

    def begin_step(self, step: Any) -> None:
        """Take notice of what the scheduler decided: who is gone, who is new, how far each one is; and put the plans
        of this step into slots. Blocks that change hands are zeroed first."""
        self.fresh_blocks.zero(getattr(step, NEW_BLOCKS_KEY, []))
        cached, scheduled = step.scheduled_cached_reqs, step.num_scheduled_tokens.keys()
        self._computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        if not step.finished_req_ids and not step.scheduled_new_reqs and scheduled == self._scheduled:
            return
        for request_id in step.finished_req_ids:
            self._drop(request_id)
        for new in step.scheduled_new_reqs:
            self._computed[new.req_id] = new.num_computed_tokens
            self._add(new)
        self._scheduled, self._stepping = set(scheduled), self.requests.keys() & scheduled
        self._layout = None
        loaded = [self.requests[request_id].plan for request_id in self._stepping]
        self._load({each.digest: each.plan for each in loaded})

    def end_step(self) -> None:
        """The step's passes are under way: keep what its probes see, and look at its rows."""
        self.probes.take()
        hidden = final_states(self.worker.model_runner, self.hidden_size) if self._rows[0] else None
        self._sums = None
        if hidden is not None:
            self._sums = StepSums.of(hidden, self._rows, self._computed, self._stepping)

    def sampled(self, output: Any) -> Any:
        """A step's output, which carries the requests whose rows are not finite."""
        sums, self._sums = self._sums, None
        return output if sums is None else sums.attach(output)

    def _add(self, new: Any) -> None:
        before = self.requests.pop(new.req_id, None)  # V2 sends preempted requests again as new ones
        wire = received(None if new.sampling_params is None else new.sampling_params.extra_args)
        if wire is None:
            return
        plan = self._plan(wire)
        sequence = -1
        if plan.latches:
            sequence = before.sequence if before is not None else self._new_sequence()
        prompt = len(new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids)
        self.requests[new.req_id] = Running(plan, prompt, sequence)
        if plan.probed and before is None and self.keeps_projections:
            self.probes.begin(new.req_id, plan.probed)

    def _new_sequence(self) -> int:
        if not self._free_sequences:
            logger.error("faststeer: so many requests are preempted that a latched gate has no place, and stays closed")
            return -1
        sequence = self._free_sequences.pop()
        self.tables.gate_state[:, sequence].zero_()  # type: ignore[index]
        return sequence

    def _drop(self, request_id: str) -> None:
        gone = self.requests.pop(request_id, None)
        if gone is not None and gone.sequence >= 0:
            self._free_sequences.append(gone.sequence)

    def _plan(self, wire: Wire) -> LoadedPlan:
        plan = self.plans.get(wire.digest)
        if plan is None:
            plan = self.plans[wire.digest] = LoadedPlan.of(wire, self.n_layers, self.hidden_size)
            while len(self.plans) > KEPT_PLANS:
                self.plans.popitem(last=False)
        self.plans.move_to_end(wire.digest)
        return plan

    def _load(self, plans: dict[Hashable, Plan]) -> None:
        """See that these plans have slots, at the cost of those used longest ago. The scheduler sees that they do not
        need more than there are (see `waiting`)."""
        self.pool.leave(self._in_use)
        self._in_use = plans
        self.pool.take(plans)

    def map_rows(self, request_ids: list[str], counts: list[int]) -> None:
        """Say what the rows of the coming pass are: each request's tokens, one request after the other. Rows behind
        them, which graphs may run for padding, belong to nobody."""
        self.probes.rows, self._rows = [], (request_ids, counts)
        layout = self._layout
        if layout is None or layout.request_ids != request_ids or layout.counts != counts:
            if not self._stepping.intersection(request_ids):
                if self._rows_in_use:
                    self.tables.rows[0, : self._rows_in_use].fill_(-1)
                self._rows_in_use, self._layout = 0, None
                return
            layout = self._layout = self._lay_out(request_ids, counts)
        before = [self._computed[i] for i in request_ids]
        for number, request_id, first, end in layout.probed:
            self.probes.rows.append((request_id, first, end, before[number]))
        of_rows = np.array(before, dtype=np.int32)
        if len(of_rows) < len(layout.offsets):
            of_rows = np.repeat(of_rows, counts)
        self._send(1, layout.offsets + of_rows)

    def _lay_out(self, request_ids: list[str], counts: list[int]) -> PassLayout:
        """Write whose the rows are; their positions are still to come."""
        records = [self.requests[i] if i in self._stepping else None for i in request_ids]
        of_requests = [
            [-1 if r is None else self.pool.slots[r.plan.digest] for r in records],
            [0 if r is None else r.sequence for r in records],
            [0 if r is None else -r.prompt_length for r in records],
        ]
        tokens = np.asarray(counts, dtype=np.int64)
        ends = np.cumsum(tokens)
        total = int(ends[-1])
        slots, sequences, offsets = np.repeat(np.asarray(of_requests, dtype=np.int32), tokens, axis=1)
        self._send(0, np.append(slots, np.full(max(self._rows_in_use - total, 0), -1, dtype=np.int32)))
        self._send(2, sequences)
        self._rows_in_use = total
        offsets += (np.arange(total) - np.repeat(ends - tokens, tokens)).astype(np.int32)
        probed = [
            (number, request_ids[number], int(ends[number] - tokens[number]), int(ends[number]))
            for number, request in enumerate(records)
            if request is not None and request.plan.probed
        ]
        return PassLayout(list(request_ids), list(counts), offsets, probed)

    def _send(self, column: int, values: np.ndarray) -> None:
        """Write the first rows of a column of the device's table, from a tensor of their own: the pass before may still
        be under way."""
        host = torch.from_numpy(values)
        if self.tables.rows.is_cuda:
            host = host.pin_memory()
        self.tables.rows[column, : len(values)].copy_(host, non_blocking=True)


class Probes:
    """What probes saw, per request, in the host's memory until somebody asks; the oldest are forgotten first.

    Args:
        tables: whose probe tensors a pass fills.
        n_layers: of the model.
        max_bytes: of all that is kept.
    """

    def __init__(self, tables: StepTables, n_layers: int, max_bytes: int) -> None:
        self.tables, self.n_layers, self.max_bytes = tables, n_layers, max_bytes
        self.rows: list[tuple[str, int, int, int]] = []  # this step's: request, rows from, to, the first row's token
        self._columns: OrderedDict[str, dict[int, int]] = OrderedDict()  # site -> number of values
        self._seen: dict[str, list[tuple[int, list[int], np.ndarray]]] = {}  # first token, sites, [site, token, value]
        self._bytes = 0
        self._coming: deque[Coming] = deque()

    def begin(self, request_id: str, columns: dict[int, int]) -> None:
        self._columns[request_id] = {s: n for s, n in columns.items() if s in self.tables.probes}
        self._seen[request_id] = []
        while len(self._columns) > KEPT_PROJECTIONS:
            self._forget(next(iter(self._columns)))

    def take(self) -> None:
        """Copy this step's rows to the host, behind the pass on the device's stream; nobody waits for it."""
        if not self.rows and not self._coming:
            return
        rows, self.rows = [row for row in self.rows if row[0] in self._columns], []
        sites = sorted({number for row in rows for number in self._columns[row[0]]})
        if sites:
            first, last = rows[0][1], rows[-1][2]
            seen, ready = torch.stack([self.tables.probes[number][first:last] for number in sites]), None
            if seen.is_cuda:
                host = torch.empty(seen.shape, dtype=seen.dtype, pin_memory=True)
                seen, ready = host.copy_(seen, non_blocking=True), torch.cuda.Event()
                ready.record()
            self._coming.append(Coming(rows, sites, first, seen, ready))
        self._receive()

    def _receive(self, wait: bool = False) -> None:
        """Keep what has arrived, or all that is on its way."""
        while self._coming and self._coming[0].arrived(wait):
            step = self._coming.popleft()
            values = step.values.numpy()
            for request_id, start, stop, token in step.rows:
                if request_id in self._columns:
                    part = values[:, start - step.first : stop - step.first].copy()
                    self._seen[request_id].append((token, step.sites, part))
                    self._bytes += part.nbytes
        while self._bytes > self.max_bytes:
            self._forget(next(iter(self._columns)))

    def _forget(self, request_id: str) -> None:
        del self._columns[request_id]
        self._bytes -= sum(values.nbytes for _, _, values in self._seen.pop(request_id))

    def give(self, request_id: str, sample: int = 0) -> Packed | None:
        """Everything seen for one sample of a request on this worker, which is forgotten with that; None if nothing
        was.

        A request is known by the id that its answer has, or by the engine's own, which begins with it; each of several
        samples is one of the engine's requests, which has its number in front.
        """
        self._receive(wait=True)
        asked = {f"{sample}_{request_id}"} | ({request_id} if sample == 0 else set())
        names = [own for own in self._columns if own in asked or own.rpartition("-")[0] in asked]
        if not names:
            return None
        packed = self._packed(names[0])
        self._forget(names[0])
        return packed

    def of_answer(self, answer: str) -> list[dict[str, Any]]:
        """What was seen so far for the choices of a server's answer, which stays known: their prompt's number, their
        number among the samples of that prompt, and the projections.

        vLLM calls the request of a choice "2_cmpl-ab-1-0123abcd" for the third sample of the second prompt of cmpl-ab.
        """
        self._receive(wait=True)
        pattern = re.compile(rf"(?:(\d+)_)?{re.escape(answer)}(?:[-_](\d+))?(?:-[0-9a-f]{{8}})?")
        matches = [(match, name) for name in self._columns if (match := pattern.fullmatch(name))]
        return [
            {"prompt": int(match[2] or 0), "sample": int(match[1] or 0), "projections": self._packed(name)}
            for match, name in matches
        ]

    def _packed(self, request_id: str) -> Packed:
        columns = self._columns[request_id]
        named = [site_name(number, self.n_layers) for number in sorted(columns)]
        return pack(self._seen[request_id], columns, [f"{at}.{layer}" for at, layer in named])


@dataclass(frozen=True)
class Coming:
    """A step's probed rows on their way to the host.

    Attributes:
        rows: as `Probes.rows`.
        sites: those that are among the values.
        first: the row of the pass that the values begin with.
        values: `[sites, rows, columns]` fp32.
        ready: tells when they are there; None: they are.
    """

    rows: list[tuple[str, int, int, int]]
    sites: list[int]
    first: int
    values: Tensor
    ready: Any

    def arrived(self, wait: bool) -> bool:
        if self.ready is None or self.ready.query():
            return True
        if wait:
            self.ready.synchronize()
        return wait


def attach(worker: Any, settings: ServerSettings) -> WorkerSteering:
    """Steer in this worker, which has been made and has loaded nothing yet."""
    steering = WorkerSteering(worker, settings)
    config = worker.vllm_config
    # vLLM finds compiled artefacts again by this: one made without steering must not be taken for one with it.
    extra = dict(config.additional_config or {})
    sizes = steering.n_slots, steering.max_rows, settings.probe_columns, settings.latched_gates
    built = f"{VERSION} {backend_for(config.device_config.device_type)} {settings.hook_points} {sizes}"
    config.additional_config = {**extra, f"{CONFIG_KEY}.built": built}

    def load_model(load: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        steering.build(worker.model_runner)
        return loaded

    def execute_model(execute: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        steering.begin_step(scheduler_output)
        output = execute(scheduler_output, *args, **kwargs)
        steering.end_step()
        return output

    wrap(worker, "load_model", load_model)
    wrap(worker, "execute_model", execute_model)
    wrap(worker, "sample_tokens", lambda sample, *args, **kwargs: steering.sampled(sample(*args, **kwargs)))
    # What `collective_rpc` calls by name; the probes are made when the model is loaded.
    worker.faststeer_projections = lambda *asked: steering.probes.give(*asked)
    worker.faststeer_projections_of = lambda answer: steering.probes.of_answer(answer)
    worker.faststeer_norms = lambda: list(steering.norms.items())
    worker.faststeer = steering
    return steering


def projections(llm: Any, request_id: str, sample: int = 0) -> Projections | None:
    """What a finished request's probes saw, as an `LLM` knows it: {"resid_pre.3": {"tokens": numbers of the tokens
    from the prompt's first, "values": one list per token}}; None where nothing was probed. It is given once.

    Of a resid_post, the name is that of the next layer's resid_pre, which is the same. The last token of the answer,
    which no pass has read, has no values.

    Args:
        llm: vLLM's.
        request_id: of the answer.
        sample: the number of one of the answer's outputs, where `SamplingParams(n=...)` asked for several.
    """
    return merged(llm.collective_rpc("faststeer_projections", args=(request_id, sample)))
