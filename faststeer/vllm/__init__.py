"""Steering per request inside vLLM: a plugin that is inert until it is switched on (docs/vllm.md).

    client.plan -> request -> front end (checks; names and files become values) -> engine -> tables in the layers

Importing this package imports no vLLM.
"""

from faststeer.vllm.client import plan

__all__ = ["plan"]
