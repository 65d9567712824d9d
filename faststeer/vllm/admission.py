"""What vLLM's front end does with a request that carries a plan, or should: it is checked and made self-contained where
faststeer is on, and refused where it is off or where steering would be wrong. Imports nothing heavy (see `switch`)."""

from __future__ import annotations

import copy
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from faststeer.vllm.switch import NONE, PAYLOAD_KEY, SWITCH, is_on
from faststeer.vllm.wrapping import wrap_imported

if TYPE_CHECKING:
    from faststeer.vllm.frontend import FrontEnd

IS_OFF = (
    f"the request carries a plan of faststeer, and this server does not steer: start it with {SWITCH}=1 in its "
    "environment, or take the plan out of the request"
)
BEAMS = (
    "beam search asks for every token by a request of its own, in which a plan cannot tell prompt from answer: leave "
    'out use_beam_search, or send {"faststeer": "none"} in vllm_xargs'
)
DEFAULT_BEAMS = (
    "beam search asks for every token by a request of its own, in which the default plan cannot tell prompt from "
    "answer: do without beam search, or start without default_plan"
)
FULL = (
    "the server runs {} different plans for other requests, which is all that its setting max_plans has room for: ask "
    'again when some have ended, or start it with a larger max_plans, or with "when_full": "wait"'
)
IGNORED = (
    "requests of this route have no field vllm_xargs, and the plan in it would be ignored: ask a route that has it, "
    "such as /v1/completions (/inference/v1/generate takes the plan in extra_args of sampling_params)"
)
RESUMABLE = "a request whose prompt grows while it runs (resumable) cannot be steered: positions count from its end"
BEAM = re.compile(r".*-beam-\d+", re.DOTALL)  # vLLM's own id of a request for one token of one beam
PROTOCOLS = ("vllm.entrypoints.openai.completion.protocol", "vllm.entrypoints.openai.chat_completion.protocol")


def init_processor(init: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Let vLLM's InputProcessor, which every request passes, know what plans are checked by."""
    init(self, vllm_config, *args, **kwargs)
    self.faststeer = None
    if is_on(vllm_config):
        from faststeer.vllm.frontend import FrontEnd
        from faststeer.vllm.modes import check_modes

        check_modes(vllm_config)
        self.faststeer = FrontEnd.of(vllm_config)


def process_inputs(
    process: Any, self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """Let vLLM's InputProcessor check plans."""
    try:
        admitted = admit(self.faststeer, params, str(request_id), bool(kwargs.get("resumable")))
    except ValueError as error:
        raise refusal()(str(error)) from error
    return process(self, request_id, prompt, admitted, *args, **kwargs)


def init_engine(init: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Let vLLM's LLMEngine, which an `LLM` has, ask its workers for what plans are checked by."""
    init(self, *args, **kwargs)
    front: FrontEnd | None = getattr(self.input_processor, "faststeer", None)
    if front is not None and front.waits_for_norms:
        front.learn(self.collective_rpc("faststeer_norms"))


def generate(
    begin: Any, self: Any, prompt: Any, sampling_params: Any, request_id: Any, *args: Any, **kwargs: Any
) -> Any:
    """Let vLLM's AsyncLLM, which a server has, check plans before a streamed answer begins, and say what became of
    requests that overflowed."""
    check_early(self, sampling_params, str(request_id))
    return _told(begin(self, prompt, sampling_params, request_id, *args, **kwargs))


async def learn_and_add(add: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Let vLLM's AsyncLLM ask its workers for what plans are checked by, before its first request."""
    await learn_norms(self)
    return await add(self, *args, **kwargs)


async def learn_norms(client: Any) -> None:
    """Ask the workers for what plans are checked by, once."""
    front: FrontEnd | None = getattr(getattr(client, "input_processor", None), "faststeer", None)
    if front is not None and front.waits_for_norms:
        front.learn(await client.collective_rpc("faststeer_norms"))


def check_early(client: Any, params: Any, request_id: str = "") -> None:
    """Refuse a request while it can still be answered with HTTP 400: once an answer is streamed, its status is 200."""
    front: FrontEnd | None = getattr(client.input_processor, "faststeer", None)
    if front is not None and front.waits_for_norms:  # no server, which asks before its first request
        return
    try:
        admitted = admit(front, params, request_id)
    except ValueError as error:
        raise refusal()(str(error)) from error
    check_room(client.output_processor, admitted)


async def _told(answers: Any) -> Any:
    """The answers, up to one that ended because it overflowed: that is an error."""
    from faststeer.vllm.isolation import reason_of

    try:
        async for answer in answers:
            for output in answer.outputs:
                if output.finish_reason == "error" and (reason := reason_of(output.stop_reason)) is not None:
                    raise failure(output.stop_reason, is_of_plan=reason != "model")
            yield answer
    finally:
        await answers.aclose()


def wrap_responses() -> None:
    """The responses API asks the engine only when its answer has begun, and breaks off a stream in which it should tell
    an error: it cannot write the event."""
    module = "vllm.entrypoints.openai.responses.serving"
    wrap_imported(module, "OpenAIServingResponses._generate_with_builtin_tools", _check_and_answer)
    wrap_imported(module, "OpenAIServingResponses.responses_stream_generator", _stream_with_error)


def _check_and_answer(answer: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    for params in (*args, *kwargs.values()):
        if hasattr(params, "extra_args"):
            check_early(self.engine_client, params)
    return answer(self, *args, **kwargs)


async def _stream_with_error(stream: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    from faststeer.vllm.isolation import reason_of

    texts: list[str] = []  # of the request's own error, which the one that breaks off does not refer to

    async def noted(answers: Any) -> Any:
        try:
            async for part in answers:
                yield part
        except Exception as error:
            texts.append(str(error))
            raise

    number = 0
    try:
        async for event in stream(self, *(noted(a) if hasattr(a, "__anext__") else a for a in args), **kwargs):
            number += 1
            yield event
    except Exception:
        if not texts or (reason := reason_of(texts[0])) is None:
            raise
        from openai.types.responses import ResponseErrorEvent

        code = "server_error" if reason == "model" else "invalid_prompt"
        yield ResponseErrorEvent(type="error", code=code, message=texts[0], param=None, sequence_number=number)


def refuse_ignored_plans() -> None:
    """vLLM drops fields that a route's requests do not have, /generative_scoring's vllm_xargs for one; a plan in them
    is refused."""
    # Every route calls _check_model first, which may answer 400.
    wrap_imported("vllm.entrypoints.serve.engine.serving", "BaseServing._check_model", _check_fields)


async def _check_fields(check: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    if PAYLOAD_KEY in ((getattr(request, "model_extra", None) or {}).get("vllm_xargs") or ()):
        return self.create_error_response(IGNORED)
    return await check(self, request, *args, **kwargs)


def admit(front: FrontEnd | None, params: Any, request_id: str = "", resumable: bool = False) -> Any:
    """The request's parameters as the engine may have them, the caller's own left alone.

    Raises:
        ValueError: its plan is wrong, or cannot act in it.
    """
    if not hasattr(params, "extra_args"):  # of a pooling request
        return params
    payload = (params.extra_args or {}).get(PAYLOAD_KEY)
    if front is None and payload not in (None, NONE):
        raise ValueError(IS_OFF)
    wire = None if front is None else front.wire(payload)
    if wire is None and PAYLOAD_KEY not in (params.extra_args or {}):
        return params
    if wire is not None and BEAM.fullmatch(request_id):
        raise ValueError(DEFAULT_BEAMS)
    if wire is not None and resumable:
        raise ValueError(RESUMABLE)
    params = copy.copy(params)
    params.extra_args = {k: v for k, v in (params.extra_args or {}).items() if k != PAYLOAD_KEY}
    if wire is not None:
        params.extra_args[PAYLOAD_KEY] = wire
        if wire["probes"]:  # a token whose keys and values are found is not computed, and nothing would be seen of it
            params.skip_reading_prefix_cache = True
    return params


def check_room_and_add(add: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Let vLLM's OutputProcessor, which knows every request of a front end until it has ended, refuse those whose plan
    would be one too many. Before it takes a request, nobody else has it."""
    if (digest := check_room(self, request.sampling_params)) is not None:
        self.faststeer_plans[request.request_id] = digest
    add(self, request, *args, **kwargs)


def check_room(processor: Any, params: Any) -> str | None:
    """The digest of the request's plan where the server has room for so many, and this is not one too many.

    Raises:
        ValueError: it is.
    """
    if PAYLOAD_KEY not in (getattr(params, "extra_args", None) or {}):
        return None
    from faststeer.vllm.requests import received

    wire = received(params.extra_args)
    if wire is None or not wire.room:
        return None
    plans: dict[str, str] = processor.__dict__.setdefault("faststeer_plans", {})  # of requests, by id
    for ended in plans.keys() - processor.request_states.keys():
        del plans[ended]
    if wire.digest not in plans.values() and len(set(plans.values())) >= wire.room:
        raise refusal()(FULL.format(wire.room))
    return wire.digest


def refusal() -> type[ValueError]:
    """The error that this vLLM answers with HTTP 400; for who calls an `LLM`, a ValueError in every version."""
    from vllm.exceptions import VLLMValidationError

    if issubclass(VLLMValidationError, ValueError):
        return VLLMValidationError

    class PlanRefused(VLLMValidationError, ValueError):
        """A request's plan is wrong; the message says how."""

    return PlanRefused


def failure(text: str, is_of_plan: bool) -> Exception:
    """The error of a request that overflowed while it ran: HTTP 400 under a plan, else 500. vLLM tells errors of this
    kind alone in a stream."""
    import vllm.exceptions

    kind = getattr(vllm.exceptions, "GenerationError", None)
    if kind is None:  # an older vLLM, which answers 500 to what it does not know
        return refusal()(text) if is_of_plan else RuntimeError(text)
    error: Exception = kind(text)
    if is_of_plan:
        error.status_code = HTTPStatus.BAD_REQUEST  # type: ignore[attr-defined]
    return error


def refuse_beams() -> None:
    """vLLM drops the extra arguments of a request for beam search; one with a plan is refused. `LLM.beam_search` has no
    such arguments; there a default plan is refused."""
    wrap_imported("vllm.entrypoints.llm", "LLM.beam_search", _search_without_default)
    for protocol in PROTOCOLS:
        for kind in ("CompletionRequest", "ChatCompletionRequest"):
            wrap_imported(protocol, f"{kind}.to_beam_search_params", _to_beam_search_without_plan)


def _search_without_default(search: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    front: FrontEnd | None = getattr(self.llm_engine.input_processor, "faststeer", None)
    if front is not None and front.settings.default_plan is not None:
        raise refusal()(DEFAULT_BEAMS)
    return search(self, *args, **kwargs)


def _to_beam_search_without_plan(to_beam_search: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if (self.vllm_xargs or {}).get(PAYLOAD_KEY) not in (None, NONE):
        raise refusal()(BEAMS)
    return to_beam_search(self, *args, **kwargs)
