"""Whether faststeer is on in a server, and the words that requests and settings share. This module, and those that wrap
vLLM's functions, import nothing heavy until it is: every vLLM process loads them wherever faststeer is installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

SWITCH = "FASTSTEER_VLLM"
CONFIG_KEY = "faststeer"  # in vLLM's additional_config
PAYLOAD_KEY = "faststeer"  # in a request's extra_args
NEW_BLOCKS_KEY = "faststeer_new_blocks"  # in a scheduler's output: what was handed out since the last step
OVERFLOWS_KEY = "faststeer_overflows"  # in a model runner's output: requests with rows that are not finite
NONE = "none"  # what a request says that wants no plan, also where the server has a default one
OFF, ON = ("", "0", "false", "off"), ("1", "true", "on")


def configured(vllm_config: Any) -> tuple[bool, Any]:
    """Whether the server's configuration speaks of faststeer, and what it says; else the environment decides."""
    config = getattr(vllm_config, "additional_config", None)
    if isinstance(config, Mapping) and CONFIG_KEY in config:
        return True, config[CONFIG_KEY]
    return False, None


def environment() -> str:
    """What the environment says: a word of `OFF` or `ON`, or settings as JSON."""
    return os.environ.get(SWITCH, "").strip()


def is_on(vllm_config: Any) -> bool:
    """Whether there are settings to be read (`ServerSettings.of`), right or wrong."""
    speaks, said = configured(vllm_config)
    return said is not False if speaks else environment().lower() not in OFF
