"""Steering per request inside vLLM: a plugin that is inert until it is switched on (docs/vllm.md).

    client.plan -> request -> front end (checks; names and files become values) -> engine -> tables in the layers

Importing this package imports no vLLM, and nothing else before it is used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faststeer.vllm.client import plan, projections

__all__ = ["plan", "projections"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from faststeer.vllm import client

        value = globals()[name] = getattr(client, name)
        return value
