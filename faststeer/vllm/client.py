"""What a client of a vLLM server sends. It needs no vLLM: the server may run on another machine."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from faststeer.intervention import Direction, Intervention
from faststeer.plan import Plan
from faststeer.vector import SteeringVector
from faststeer.vllm.switch import NONE, PAYLOAD_KEY


def plan(
    what: Plan | Intervention | str | None, *, names: Mapping[str, SteeringVector] | None = None
) -> dict[str, str]:
    """What goes into `SamplingParams(extra_args=...)`, or over HTTP into the field `vllm_xargs`.

    Args:
        what: a plan, or one intervention; the name of a plan that the server knows; None: unsteered, also on a server
            with a default plan.
        names: vectors that the server knows, by the names they have there; they are sent by name, all others by value.

    Examples:
        SamplingParams(max_tokens=64, extra_args=faststeer.vllm.plan(fs.Plan([fs.Add(v, 2.0)])))
        client.completions.create(..., extra_body={"vllm_xargs": faststeer.vllm.plan("calm")})

    Raises:
        TypeError: none of these.
    """
    if what is None:
        return {PAYLOAD_KEY: NONE}
    if isinstance(what, str):
        return {PAYLOAD_KEY: what}
    if isinstance(what, Intervention):
        what = Plan([what])
    if not isinstance(what, Plan):
        raise TypeError(f"expected a Plan, an intervention, a plan's name or None, got {type(what).__name__}")
    return {PAYLOAD_KEY: _by_value(what, names or {})}


def projections(
    base_url: str, answer: str, *, api_key: str | None = None, timeout: float = 60.0
) -> list[dict[str, dict[str, list[Any]]]]:
    """What the probes of a completion or chat saw, asked of the server that gave the answer, once it is complete.

    Args:
        base_url: of the server, such as "http://localhost:8000/v1".
        answer: its id, such as "cmpl-..." or "chatcmpl-...".
        api_key: the server's.
        timeout: in seconds.

    Returns:
        One for each choice of the answer, in its order: {"resid_pre.3": {"tokens": numbers of the tokens from the
        prompt's first, "values": one list of probed values per token}}. A resid_post has the name of the next layer's
        resid_pre, which is the same. The last token of an answer, which no pass has read, has none.

    Raises:
        LookupError: the server knows none: the plan has no probes, or they were forgotten for newer ones.
        RuntimeError: the server refuses, or is no vLLM server with faststeer; the message is its own.
    """
    request = urllib.request.Request(
        f"{base_url.rstrip('/')}/faststeer/projections/{urllib.parse.quote(answer, safe='')}",
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return [choice["projections"] for choice in json.load(response)["choices"]]
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        if error.code == 404 and "no probes of an answer" in said:
            raise LookupError(said) from error
        raise RuntimeError(f"{base_url} answers {error.code}: {said[:1000]}") from error


def _by_value(plan: Plan, names: Mapping[str, SteeringVector]) -> str:
    """JSON in which what has no name is inline: the server has none of the client's files."""
    if not names:
        return plan.to_json(inline=True)
    known = {id(vector) for vector in names.values()}

    def without_file(direction: Direction) -> Direction:
        if isinstance(direction, SteeringVector) and id(direction) not in known:
            return replace(direction, path=None, sha256=None)
        return direction

    def change(intervention: Intervention) -> Intervention:
        changed: dict[str, Any] = {n: without_file(getattr(intervention, n)) for n in intervention.direction_names}
        if (gate := intervention.when) is not None:
            changed["when"] = replace(gate, direction=without_file(gate.direction))
        return replace(intervention, **changed)

    return Plan([change(intervention) for intervention in plan]).to_json(names)
