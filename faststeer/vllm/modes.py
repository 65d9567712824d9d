"""Ways of running vLLM in which faststeer does not steer, and says so."""

from __future__ import annotations

from typing import Any

from faststeer.vllm.switch import SWITCH


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
