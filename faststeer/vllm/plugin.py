"""vLLM's entry point: `register` is called in every process of a server. It puts functions of vLLM's behind wrappers
that do nothing unless a server's settings switch faststeer on, and refuses what it cannot steer rightly: other versions
of vLLM, and modes in which rows are not where the scheduler says. Imports nothing heavy (see `switch`).
"""

from __future__ import annotations

import contextlib
from typing import Any

from faststeer.vllm.switch import OFF, PAYLOAD_KEY, SWITCH, environment, is_on
from faststeer.vllm.wrapping import wrap

VERSIONS = ("0.24", "0.25", "0.32", "0.33")  # whose worker, scheduler and runners were read (docs/vllm.md)


def register() -> None:
    """Install the wrappers, each once per process.

    Raises:
        RuntimeError: FASTSTEER_VLLM switches faststeer on, and this version of vLLM is not supported.
    """
    why_not = unsupported()
    if why_not and environment().lower() not in OFF:
        raise RuntimeError(why_not)
    if why_not:
        with contextlib.suppress(ImportError):  # a vLLM without such a worker, and it is not to be steered
            _wrap_worker(why_not)
        return
    _wrap_worker()
    _wrap_front_end()
    _wrap_hashing()
    _wrap_scheduler()


def unsupported() -> str:
    """Why this vLLM cannot be steered; "" if it can."""
    import vllm

    version = str(vllm.__version__)
    if ".".join(version.split(".")[:2]) in VERSIONS:
        return ""
    return (
        f"faststeer steers vLLM {', '.join(VERSIONS)}; this is {version}, whose insides it does not know: install one "
        f"of those, or start without faststeer ({SWITCH}=0)"
    )


def _wrap_worker(why_not: str = "") -> None:
    """A worker is told when it is made, before it loads a model."""
    from vllm.v1.worker.worker_base import WorkerBase

    def init_worker(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not is_on(self.vllm_config):
            return
        if why_not:
            raise RuntimeError(why_not)
        from faststeer.vllm.modes import check_modes
        from faststeer.vllm.settings import ServerSettings
        from faststeer.vllm.worker import attach

        if (settings := ServerSettings.of(self.vllm_config)) is not None:
            check_modes(self.vllm_config)
            attach(self, settings)

    wrap(WorkerBase, "__init__", init_worker)


def _wrap_front_end() -> None:
    """Requests are checked on their way in; a server has faststeer's routes. What a server has imported of vLLM may
    grow between two calls."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor

    from faststeer.vllm import admission, server

    wrap(InputProcessor, "__init__", admission.init_processor)
    wrap(InputProcessor, "process_inputs", admission.process_inputs)
    wrap(OutputProcessor, "add_request", admission.check_room_and_add)
    wrap(LLMEngine, "__init__", admission.init_engine)
    wrap(AsyncLLM, "generate", admission.generate)
    wrap(AsyncLLM, "add_request", admission.learn_and_add)
    admission.refuse_beams()
    server.install()


def _wrap_hashing() -> None:
    """Blocks of keys and values are shared only where plans do the same (see `prefix_cache`). Requests without a plan
    are hashed as ever."""
    from vllm.v1.core import kv_cache_utils

    wrap(kv_cache_utils, "generate_block_hash_extra_keys", _extra_keys)


def _extra_keys(extra_keys_of: Any, request: Any, start: int, end: int, *args: Any, **kwargs: Any) -> Any:
    extra_keys, *rest = extra_keys_of(request, start, end, *args, **kwargs)
    if PAYLOAD_KEY in (getattr(request.sampling_params, "extra_args", None) or {}):
        from faststeer.vllm.prefix_cache import with_block_key

        extra_keys = with_block_key(extra_keys, request, start, end)
    return extra_keys, *rest


def _wrap_scheduler() -> None:
    """Where a server has room for fewer plans than requests, requests whose plan finds none wait. Nothing of one
    request reaches another (see `isolation`)."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "__init__", _init_scheduler)
    wrap(Scheduler, "schedule", _schedule)
    wrap(Scheduler, "update_from_output", _update_from_output)
    for scheduler in (Scheduler, AsyncScheduler):
        wrap(scheduler, "_update_request_with_output", _take_tokens)


def _init_scheduler(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    init(self, *args, **kwargs)
    self.faststeer_isolation = None
    if is_on(self.vllm_config):
        from faststeer.vllm.isolation import Isolation

        self.faststeer_isolation = Isolation(self)


def _schedule(schedule: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.faststeer_isolation is None:
        return schedule(self, *args, **kwargs)
    from faststeer.vllm.waiting import held_back

    with held_back(self):
        step = schedule(self, *args, **kwargs)
    self.faststeer_isolation.announce(step)
    return step


def _update_from_output(update: Any, self: Any, step: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
    if self.faststeer_isolation is not None:
        self.faststeer_isolation.note(output)
    return update(self, step, output, *args, **kwargs)


def _take_tokens(take_tokens: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """A request that has overflowed takes no more tokens, and ends."""
    from vllm.v1.request import RequestStatus

    isolation = self.faststeer_isolation
    if isolation is not None and isolation.ends(request, RequestStatus.FINISHED_ERROR):
        return [], True
    return take_tokens(self, request, *args, **kwargs)
