"""Projections of probes on their way from the workers to a client. Workers pack them as bytes, which takes little time
between two steps; the receiver unpacks them into numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Projections = dict[str, dict[str, list[Any]]]  # "resid_pre.3" -> {"tokens": [token], "values": [token][value]}
Packed = dict[str, Any]  # {"tokens": int32 bytes, "sites": {"resid_pre.3": [values per token, fp32 bytes]}}


def pack(
    seen: Iterable[tuple[int, Sequence[int], np.ndarray]], columns: Mapping[int, int], names: Sequence[str]
) -> Packed:
    """The parts of one request, in the order in which they were computed, as one.

    Args:
        seen: first token, sites in rising order, and values `[sites, tokens, width]` fp32 of each part. Of tokens that
            were computed twice (a preempted request's), the second time counts.
        columns: site -> its values per token, at most the width; every part has these sites.
        names: of these sites.
    """
    sites, tokens, parts = sorted(columns), [np.zeros(0, np.int32)], []
    for first, listed, values in seen:
        tokens.append(np.arange(first, first + values.shape[1], dtype=np.int32))
        parts.append(values[np.searchsorted(listed, sites)])
    computed = np.concatenate(tokens)
    unique, last = np.unique(computed[::-1], return_index=True)
    joined = np.concatenate(parts, axis=1)[:, len(computed) - 1 - last] if parts else np.zeros((len(sites), 0, 0))
    packed = {n: [columns[s], part[:, : columns[s]].tobytes()] for n, s, part in zip(names, sites, joined, strict=True)}
    return {"tokens": unique.tobytes(), "sites": packed}


def unpack(packed: Packed) -> Projections:
    """Numbers again."""
    tokens = np.frombuffer(packed["tokens"], np.int32).tolist()
    return {
        name: {"tokens": tokens, "values": np.frombuffer(values, np.float32).reshape(-1, columns).tolist()}
        for name, (columns, values) in packed["sites"].items()
    }


def merged(packed: Sequence[Packed | None]) -> Projections | None:
    """What all workers know of a request: each pipeline stage has its own layers. None: nobody knows any."""
    return {name: seen for part in packed if part for name, seen in unpack(part).items()} or None


def choices(per_engine: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The choices of an answer out of what workers know of them (`worker.Probes.of_answer`), in the answer's order."""
    known: dict[tuple[int, int], list[Packed]] = {}
    for choice in (choice for answer in per_engine for choice in answer):
        known.setdefault((choice["prompt"], choice["sample"]), []).append(choice["projections"])
    return [{"prompt": p, "sample": s, "projections": merged(known[p, s]) or {}} for p, s in sorted(known)]
