"""vLLM's entry point: `register` is called in every process of a server. It puts four functions of vLLM's behind
wrappers that do nothing unless a server's settings switch faststeer on, and refuses what it cannot steer rightly:
other versions of vLLM, and modes in which rows are not where the scheduler says.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

from faststeer.vllm.settings import OFF, SWITCH, Settings

VERSIONS = ("0.24", "0.25", "0.32", "0.33")  # whose worker, scheduler and runners were read (docs/vllm.md)


def register() -> None:
    """Install the wrappers, once per process.

    Raises:
        RuntimeError: FASTSTEER_VLLM switches faststeer on, and this version of vLLM is not supported.
    """
    why_not = unsupported()
    if why_not and os.environ.get(SWITCH, "").strip().lower() not in OFF:
        raise RuntimeError(why_not)
    if why_not:
        with contextlib.suppress(ImportError):  # a vLLM without such a worker, and it is not to be steered
            install(why_not)
        return
    from faststeer.vllm import frontend

    frontend.install()
    install()


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


def install(why_not: str = "") -> None:
    """Wrap the worker, the hashing of blocks and the scheduler."""
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase.__init__, "faststeer"):
        return
    made = WorkerBase.__init__

    @functools.wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        settings = Settings.of(self.vllm_config)
        if settings is None:
            return
        if why_not:
            raise RuntimeError(why_not)
        check_modes(self.vllm_config)
        from faststeer.vllm.worker import attach

        attach(self, settings)

    init.faststeer = True  # type: ignore[attr-defined]
    WorkerBase.__init__ = init
    if not why_not:
        _wrap_hashing()
        _wrap_scheduler()


def _wrap_hashing() -> None:
    """Blocks of keys and values are shared only where plans do the same (see `prefix_cache`). Requests without a plan
    are hashed as ever."""
    from vllm.v1.core import kv_cache_utils

    from faststeer.vllm.prefix_cache import with_block_key

    extra_keys_of = kv_cache_utils.generate_block_hash_extra_keys

    @functools.wraps(extra_keys_of)
    def generate_block_hash_extra_keys(request: Any, start: int, end: int, *args: Any, **kwargs: Any) -> Any:
        extra_keys, *rest = extra_keys_of(request, start, end, *args, **kwargs)
        return with_block_key(extra_keys, request, start, end), *rest

    kv_cache_utils.generate_block_hash_extra_keys = generate_block_hash_extra_keys


def _wrap_scheduler() -> None:
    """Where a server has room for fewer plans than requests, requests whose plan finds none wait."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from faststeer.vllm.waiting import held_back

    schedule = Scheduler.schedule

    @functools.wraps(schedule)
    def scheduled(self: Any, *args: Any, **kwargs: Any) -> Any:
        with held_back(self):
            return schedule(self, *args, **kwargs)

    Scheduler.schedule = scheduled


def check_modes(config: Any) -> None:
    """Raise RuntimeError for ways of running vLLM in which steering would be wrong."""
    parallel, compilation = config.parallel_config, config.compilation_config
    passes = getattr(compilation, "pass_config", None)
    refused = {
        "dual batch overlap (--enable-dbo) and micro-batching": getattr(parallel, "enable_dbo", False)
        or getattr(parallel, "use_ubatching", False),
        "sequence parallelism (pass_config.enable_sp)": getattr(passes, "enable_sp", False)
        or getattr(passes, "enable_sequence_parallelism", False),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "kv_sharing_fast_prefill": getattr(config.cache_config, "kv_sharing_fast_prefill", False),
        "speculative decoding": config.speculative_config is not None,
        "KV connectors (kv_transfer_config), which know blocks by their tokens alone": config.kv_transfer_config
        is not None,
        "encoder-decoder models": getattr(config.model_config, "is_encoder_decoder", False),
        "pooling models": getattr(config.model_config, "runner_type", "generate") not in ("generate", "draft"),
    }
    for what, used in refused.items():
        if used:
            raise RuntimeError(
                f"faststeer cannot steer with {what}: switch that off, or start without faststeer ({SWITCH}=0)"
            )
