"""faststeer's routes in a vLLM server: what there is, registering and removing, and what probes saw. All under /v1,
which is what vLLM guards with its API key; registering and removing only where the server's settings allow them.
Imports nothing heavy (see `switch`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from faststeer.vllm.admission import learn_norms, refuse_beams, refuse_ignored_plans, wrap_responses
from faststeer.vllm.switch import is_on
from faststeer.vllm.wrapping import wrap_imported

if TYPE_CHECKING:
    from faststeer.vllm.frontend import FrontEnd

PREFIX = "/v1/faststeer"
# Modules that call build_app by their own name for it, in one version or another; the server has imported them by the
# time that vLLM loads plugins.
BUILDERS = (
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.api_server.entry",
)


def install() -> None:
    """Let the servers of this process have the routes, those in which faststeer is on."""
    ran = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)  # python -m vllm.entrypoints...
    for module in (*BUILDERS, *(["__main__"] if ran in BUILDERS else [])):
        wrap_imported(module, "build_app", _build_with_routes)


def _build_with_routes(build: Any, args: Any, *more: Any, **named: Any) -> Any:
    app = build(args, *more, **named)
    refuse_beams()
    refuse_ignored_plans()
    wrap_responses()
    if is_on(args):
        app.router.routes.extend(routes())
        app.router.lifespan_context = _with_norms(app.router.lifespan_context)
    return app


def _with_norms(lifespan: Any) -> Any:
    """Before its first request, a server knows what plans are checked by."""

    @contextlib.asynccontextmanager
    async def started(app: Any) -> Any:
        await learn_norms(app.state.engine_client)
        async with lifespan(app) as state:
            yield state

    return started


def routes() -> list[Any]:
    """What a client may ask (GET), register (PUT: a vector's safetensors file, a plan's JSON) and remove (DELETE)."""
    # Here and not above: Starlette comes with vLLM.
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from faststeer.vllm.packed_projections import choices
    from faststeer.vllm.registry import read_vector

    async def about(request: Any) -> Any:
        return JSONResponse(_front_end(request).about())

    async def change(request: Any) -> Any:
        kind, name = request.path_params["kind"], request.path_params["name"]
        front = _front_end(request)
        if kind not in ("vectors", "plans"):
            raise HTTPException(404, f"there are no {kind[:40]!r}: expected vectors or plans")
        if not front.settings.http_registration:
            raise HTTPException(403, 'registration is off: start the server with the setting "http_registration": true')
        if _front_ends(request) > 1:
            raise HTTPException(
                409, "this server has several front ends, and only one would know: put the file into its folder"
            )
        try:
            if request.method == "DELETE":
                (front.registry.remove_vector if kind == "vectors" else front.registry.remove_plan)(name)
                return JSONResponse({"removed": name})
            if kind == "vectors":
                front.register_vector(name, read_vector(await _body(request, front.settings.max_vector_bytes)))
            else:
                front.register_plan(name, (await _body(request, front.settings.max_plan_bytes)).decode())
        except ValueError as error:  # UnicodeDecodeError is one
            raise HTTPException(404 if request.method == "DELETE" else 400, str(error)) from error
        return JSONResponse({"registered": name})

    async def projections(request: Any) -> Any:
        answer = request.path_params["answer"]
        packed = await _from_workers(request.app.state.engine_client, "faststeer_projections_of", answer)
        if not any(packed):
            raise HTTPException(
                404,
                f"no probes of an answer with the id {answer[:200]!r} are known: its plan has none, or they were "
                'forgotten for newer ones; the setting "max_projection_bytes" says how many are kept',
            )
        # In a thread of its own: of long answers these are millions of numbers.
        text = await asyncio.to_thread(lambda: json.dumps({"id": answer, "choices": choices(packed)}))
        return Response(text, media_type="application/json")

    return [
        Route(PREFIX, about, methods=["GET"]),
        Route(PREFIX + "/projections/{answer:path}", projections, methods=["GET"]),
        Route(PREFIX + "/{kind}/{name}", change, methods=["PUT", "DELETE"]),
    ]


def _front_end(request: Any) -> FrontEnd:
    return request.app.state.engine_client.input_processor.faststeer


async def _from_workers(client: Any, method: str, *arguments: Any) -> list[Any]:
    """What every worker of every engine (data parallel ranks are engines of their own) says."""
    from starlette.exceptions import HTTPException

    core = client.engine_core
    if len(getattr(core, "core_engines", ())) > 1:
        if not hasattr(core, "call_utility_all_async"):
            raise HTTPException(501, "this version of vLLM asks one of its engines alone: use no data parallelism")
        asked = await core.call_utility_all_async("collective_rpc", method, None, arguments, None)
        return [answer for engine in asked for answer in engine]
    return await client.collective_rpc(method, args=arguments)


def _front_ends(request: Any) -> int:
    return getattr(request.app.state.engine_client.vllm_config.parallel_config, "_api_process_count", 1)


async def _body(request: Any, most: int) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise ValueError(f"more than the {most:,} bytes that are allowed")
    return bytes(data)
