"""Tests that need vLLM: `make test-vllm`, in an environment of their own. Elsewhere nothing here is collected."""

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# This folder's own name can be imported, too: what only vLLM has decides.
if importlib.util.find_spec("vllm.engine") is None:
    collect_ignore_glob = ["*.py"]
else:
    # In this process, so that a test can look inside; one thread, so that the same work has the same bits.
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    os.environ.pop("FASTSTEER_VLLM", None)
    os.environ.pop("VLLM_PLUGINS", None)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled artefacts are those of this session."""
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Any]]:
    """Start an engine with the demo model, ending the one before."""
    running: list[Any] = []

    def end() -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        for engine in running:
            engine.llm_engine.engine_core.shutdown()
        running.clear()
        gc.collect()
        cleanup_dist_env_and_memory()

    def begin(settings: Any = True, **arguments: Any) -> Any:
        from vllm import LLM

        import faststeer as fs

        end()
        defaults: dict[str, Any] = {
            "model": str(fs.demo.FOLDER), "dtype": "float32", "max_model_len": 256, "block_size": 32,
            "max_num_batched_tokens": 64, "max_num_seqs": 32, "enable_prefix_caching": True, "enforce_eager": True,
            "additional_config": {} if settings is None else {"faststeer": settings},
        }  # fmt: skip
        running.append(LLM(**(defaults | arguments)))
        return running[0]

    yield begin
    if running:
        end()
