"""Nothing of one request reaches another: what the engine's scheduler does about it. Imports nothing heavy (see
`switch`).

A request whose hidden states overflow writes NaN into its blocks of keys and values. Attention masks what lies behind
the end of a sequence, and 0 x NaN is NaN: whoever gets such a block later would be wrong. So every block that the
scheduler hands out is zeroed by the workers before the next pass, whatever it held. This needs no knowledge of which
rows were bad, and so holds where that knowledge comes late: asynchronous scheduling, preemption, aborted requests.

Requests of which a worker says that their rows are not finite (`overflow`) end with an error. The prefix cache forgets
the blocks that they wrote, and those that were given up before anyone looked at their rows.
"""

from __future__ import annotations

from typing import Any

from faststeer.vllm.switch import NEW_BLOCKS_KEY, OVERFLOWS_KEY
from faststeer.vllm.wrapping import wrap

BAD = "the hidden states of token {} are not finite, or so large that the final norm makes them zero"
REASONS = {  # why a request overflowed -> what it ends with
    "plan": f"the model overflowed under the plan: {BAD}; use a smaller coefficient",
    "model": f"the model overflowed: {BAD}, and the request has no plan; this is the model's own computation, or its "
    "weights",
}


class Isolation:
    """Keeps the requests of one scheduler apart.

    Args:
        scheduler: vLLM's. Its pool of blocks and its manager of keys and values are wrapped, on the instances.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self._manager = scheduler, scheduler.kv_cache_manager
        self._new_blocks: list[int] = []
        pool = self._manager.block_pool

        def get_new_blocks(hand_out: Any, *args: Any, **kwargs: Any) -> Any:
            blocks = hand_out(*args, **kwargs)
            self._new_blocks += [block.block_id for block in blocks]
            return blocks

        wrap(pool, "get_new_blocks", get_new_blocks)
        for name in ("free", "pop_blocks_for_free"):
            if hasattr(self._manager, name):
                wrap(self._manager, name, self._forget_and_free)

    def _forget_and_free(self, free: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        in_flight = getattr(request, "num_in_flight_tokens", 0)
        if overflow := getattr(request, "faststeer_overflow", None):
            self._forget(request, overflow[0])
        elif in_flight:
            self._forget(request, max(request.num_computed_tokens - in_flight, 0))
        return free(request, *args, **kwargs)

    def _forget(self, request: Any, token: int) -> None:
        """The prefix cache no longer knows the request's blocks from the one with this token on."""
        config = self._scheduler.vllm_config
        ranks = getattr(config.parallel_config, "decode_context_parallel_size", 1)
        groups = self._scheduler.kv_cache_config.kv_cache_groups
        for group, ids in zip(groups, self._manager.get_block_ids(request.request_id), strict=True):
            first = token // (group.kv_cache_spec.block_size * ranks)
            self._manager.evict_blocks(set(ids[first:]))

    def announce(self, step: Any) -> None:
        """Tell the workers which blocks were handed out since the last step."""
        setattr(step, NEW_BLOCKS_KEY, self._new_blocks)
        self._new_blocks = []

    def note(self, output: Any) -> None:
        """Remember what the workers say of a step's requests. A request whose prompt comes in pieces ends with its last
        one, and keeps the first that is bad; one that was preempted meanwhile keeps it, too."""
        for request_id, (token, reason) in (getattr(output, OVERFLOWS_KEY, None) or {}).items():
            request = self._scheduler.requests.get(request_id)
            if request is not None and not hasattr(request, "faststeer_overflow"):
                request.faststeer_overflow = token, REASONS[reason].format(token)

    @staticmethod
    def ends(request: Any, error: Any) -> bool:
        """Whether the request has overflowed; then it has ended with `error`, and says why."""
        overflow = getattr(request, "faststeer_overflow", None)
        if overflow is None:
            return False
        request.status, request.stop_reason, request.resumable = error, overflow[1], False
        return True


def reason_of(stop_reason: Any) -> str | None:
    """Why a request that ended with an error overflowed, a key of `REASONS`; None: it has another error."""
    if not isinstance(stop_reason, str):
        return None
    return next((reason for reason, text in REASONS.items() if stop_reason.startswith(text.partition("{")[0])), None)
