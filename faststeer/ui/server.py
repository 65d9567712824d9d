"""The playground's web server: on this machine alone unless told otherwise, and a page that asks nobody else.

The content security policy keeps the browser from asking any other address, whatever gradio's page would like.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any

from faststeer.ui.answers import Playground
from faststeer.ui.page import CSS, page, theme

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'none'"
)


def bind(host: str, port: int) -> socket.socket:
    """A listening address, before anything slow is done; port 0 takes a free one.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
        ValueError: no port number.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port {port} is none: expected 0 (any that is free) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OSError(f"{host!r} is no address of this machine ({error.strerror}): try 127.0.0.1") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)  # now, and not when the server starts: another process that came between would take it
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} on {host} is taken: choose another with --port, or --port 0 for any that is free"
        else:
            message = f"{host}, port {port} cannot be listened on ({error.strerror})"
        raise OSError(message) from error
    return bound


def url(bound: socket.socket) -> str:
    """Where a browser finds what is served on a bound socket."""
    host, port = bound.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def server(playground: Playground, *, max_new_tokens: int = 64, system: str | None = None) -> Any:
    """A `uvicorn.Server` of the page: `.run(sockets=[bind(host, port)])`, `.should_exit = True` to stop it."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI, Request

    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def keep_to_itself(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    blocks = page(playground, max_new_tokens=max_new_tokens, system=system)
    gr.mount_gradio_app(
        app, blocks, path="/", theme=theme(), css=CSS, ssr_mode=False, footer_links=[], mcp_server=False, pwa=False
    )
    # Open pages hold a connection each: they are not waited for at the end.
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
