"""What vLLM's front end does with a request that carries a plan, or should: it is checked and made self-contained where
faststeer is on, and refused where it is off or where steering would be wrong. Imports nothing heavy (see `switch`)."""

from __future__ import annotations

import copy
import functools
import re
import sys
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from faststeer.vllm.switch import NONE, PAYLOAD_KEY, SWITCH, is_on

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


def wrap_input(processor: Any) -> None:
    """Let vLLM's InputProcessor, which every request passes, check plans."""
    original_init, process, refused = processor.__init__, processor.process_inputs, refusal()

    @functools.wraps(original_init)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, vllm_config, *args, **kwargs)
        self.faststeer = None
        if is_on(vllm_config):
            from faststeer.vllm.frontend import FrontEnd
            from faststeer.vllm.modes import check_modes

            check_modes(vllm_config)
            self.faststeer = FrontEnd.of(vllm_config)

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            admitted = admit(self.faststeer, params, str(request_id), bool(kwargs.get("resumable")))
        except ValueError as error:
            raise refused(str(error)) from error
        return process(self, request_id, prompt, admitted, *args, **kwargs)

    process_inputs.faststeer = True  # type: ignore[attr-defined]
    processor.__init__, processor.process_inputs = init, process_inputs


def wrap_engine(engine: Any) -> None:
    """Let vLLM's LLMEngine, which an `LLM` has, ask its workers for what plans are checked by."""
    original_init = engine.__init__

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        front: FrontEnd | None = getattr(self.input_processor, "faststeer", None)
        if front is not None and front.waits_for_norms:
            front.learn(self.collective_rpc("faststeer_norms"))

    init.faststeer = True  # type: ignore[attr-defined]
    engine.__init__ = init


def wrap_async_engine(engine: Any) -> None:
    """Let vLLM's AsyncLLM, which a server has, check plans before a streamed answer begins, and say what became of
    requests that overflowed."""
    generate, add = engine.generate, engine.add_request

    @functools.wraps(generate)
    def generated(self: Any, prompt: Any, sampling_params: Any, request_id: Any, *args: Any, **kwargs: Any) -> Any:
        check_early(self, sampling_params, str(request_id))
        return _told(generate(self, prompt, sampling_params, request_id, *args, **kwargs))

    @functools.wraps(add)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        await learn_norms(self)
        return await add(self, *args, **kwargs)

    generated.faststeer = True  # type: ignore[attr-defined]
    engine.generate, engine.add_request = generated, add_request


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
    serving = getattr(sys.modules.get("vllm.entrypoints.openai.responses.serving"), "OpenAIServingResponses", None)
    answer = getattr(serving, "_generate_with_builtin_tools", None)
    if answer is None or hasattr(answer, "faststeer"):
        return

    @functools.wraps(answer)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for params in (*args, *kwargs.values()):
            if hasattr(params, "extra_args"):
                check_early(self.engine_client, params)
        return answer(self, *args, **kwargs)

    stream = serving.responses_stream_generator  # type: ignore[union-attr]

    @functools.wraps(stream)
    async def streamed(self: Any, *args: Any, **kwargs: Any) -> Any:
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

    checked.faststeer = True  # type: ignore[attr-defined]
    serving._generate_with_builtin_tools = checked  # type: ignore[union-attr]
    serving.responses_stream_generator = streamed  # type: ignore[union-attr]


def refuse_ignored_plans() -> None:
    """vLLM drops fields that a route's requests do not have, /generative_scoring's vllm_xargs for one; a plan in them
    is refused."""
    serving = getattr(sys.modules.get("vllm.entrypoints.serve.engine.serving"), "BaseServing", None)
    check = getattr(serving, "_check_model", None)  # which every route calls first, and may answer 400
    if check is None or hasattr(check, "faststeer"):
        return

    @functools.wraps(check)
    async def checked(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if PAYLOAD_KEY in ((getattr(request, "model_extra", None) or {}).get("vllm_xargs") or ()):
            return self.create_error_response(IGNORED)
        return await check(self, request, *args, **kwargs)

    checked.faststeer = True  # type: ignore[attr-defined]
    serving._check_model = checked  # type: ignore[union-attr]


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


def wrap_output(processor: Any) -> None:
    """Let vLLM's OutputProcessor, which knows every request of a front end until it has ended, refuse those whose plan
    would be one too many. Before it takes a request, nobody else has it."""
    add = processor.add_request

    @functools.wraps(add)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        if (digest := check_room(self, request.sampling_params)) is not None:
            self.faststeer_plans[request.request_id] = digest
        add(self, request, *args, **kwargs)

    add_request.faststeer = True  # type: ignore[attr-defined]
    processor.add_request = add_request


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
    refused = refusal()
    offline = getattr(sys.modules.get("vllm.entrypoints.llm"), "LLM", None)
    if offline is not None and not hasattr(offline.beam_search, "faststeer"):
        offline.beam_search = _without_default(offline.beam_search, refused)
    for protocol in PROTOCOLS:
        for kind in ("CompletionRequest", "ChatCompletionRequest"):
            request = getattr(sys.modules.get(protocol), kind, None)
            to_beam_search = getattr(request, "to_beam_search_params", None)
            if to_beam_search is None or hasattr(to_beam_search, "faststeer"):
                continue
            request.to_beam_search_params = _without_plan(to_beam_search, refused)  # type: ignore[union-attr]


def _without_default(search: Any, refused: type[ValueError]) -> Any:
    @functools.wraps(search)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        front: FrontEnd | None = getattr(self.llm_engine.input_processor, "faststeer", None)
        if front is not None and front.settings.default_plan is not None:
            raise refused(DEFAULT_BEAMS)
        return search(self, *args, **kwargs)

    beam_search.faststeer = True  # type: ignore[attr-defined]
    return beam_search


def _without_plan(to_beam_search: Any, refused: type[ValueError]) -> Any:
    @functools.wraps(to_beam_search)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (self.vllm_xargs or {}).get(PAYLOAD_KEY) not in (None, NONE):
            raise refused(BEAMS)
        return to_beam_search(self, *args, **kwargs)

    to_beam_search_params.faststeer = True  # type: ignore[attr-defined]
    return to_beam_search_params
