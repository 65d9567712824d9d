"""Requests whose plan has no slot wait. Only where a server has room for fewer plans than sequences; runs in the
engine's process, around the scheduler's decision on the next step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from faststeer.vllm.requests import received
from faststeer.vllm.settings import ServerSettings

QUEUES = ("waiting", "skipped_waiting", "kv_holding_waiting")  # of one version of vLLM or another
PATIENCE = 10.0  # seconds that a request is overtaken by later ones whose plans have slots


@contextmanager
def held_back(scheduler: Any) -> Iterator[None]:
    """Take from the scheduler's queues, while it decides, the requests whose plan would be one too many."""
    slots = slots_of(scheduler)
    if slots is None:
        yield
        return
    queues = [getattr(scheduler, name) for name in QUEUES if hasattr(scheduler, name)]
    late = too_many((request for queue in queues for request in queue), scheduler.running, slots, time.time())
    held = [[request for request in queue if request in late] for queue in queues]
    for queue, requests in zip(queues, held, strict=True):
        if requests:
            queue.remove_requests(requests)
    try:
        yield
    finally:
        for queue, requests in zip(queues, held, strict=True):
            for request in reversed(requests):  # to the front, so that they keep their order and their turn
                queue.prepend_request(request)


def slots_of(scheduler: Any) -> int | None:
    """How many plans fit at one time; None where there is a slot for every sequence, or faststeer is off."""
    if not hasattr(scheduler, "faststeer_slots"):
        settings = ServerSettings.of(scheduler.vllm_config)
        sequences = scheduler.scheduler_config.max_num_seqs
        few = settings is not None and settings.max_plans is not None and settings.max_plans < sequences
        scheduler.faststeer_slots = settings.max_plans if settings is not None and few else None
    return scheduler.faststeer_slots


def too_many(waiting: Iterable[Any], running: Iterable[Any], slots: int, now: float) -> set[Any]:
    """The waiting requests, in their order, whose plan finds no slot beside those of the running ones.

    Behind one that has waited for longer than `PATIENCE`, all others with plans wait, too: running ones end, and their
    slots come free, however many arrive under the plans that have slots now.
    """
    digests = {digest for request in running if (digest := digest_of(request)) is not None}
    late, closed = set(), False
    for request in waiting:
        digest = digest_of(request)
        if digest is None:
            continue
        if not closed and (digest in digests or len(digests) < slots):
            digests.add(digest)
        else:
            late.add(request)
            closed = closed or now - request.arrival_time > PATIENCE
    return late


def digest_of(request: Any) -> str | None:
    """Of the request's plan, if it has one."""
    parameters = request.sampling_params
    wire = received(parameters.extra_args) if parameters is not None else None
    return None if wire is None else wire.digest
