"""The ASGI application of `sample.py --serve`: a page to try a model, and OpenAI's protocol for completions."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import html
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from generation.terminal import load
from serve.completions import Part, RequestError, choice, join, parse_request, usage
from serve.engine import Engine, Job

MAX_BODY = 1 << 20  # largest number of bytes in the body of a request; a prompt that fits into a GPT-2 has far fewer
# A larger body is refused. The server still reads and discards up to this number of bytes, because a client may read
# the error only after it has sent the whole body.
MAX_DISCARDED = 64 << 20
BODY_SECONDS = 30  # seconds in which a client must send the body of its request
MAX_CONNECTIONS = 512
LOCAL_NAMES = ["127.0.0.1", "localhost", "[::1]"]
HERE = Path(__file__).parent
REPORT_TEMPLATES = HERE.parent / "report" / "templates"  # the page uses the style and a script of the reports
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
)


def make_app(engine: Engine, name: str, description: str, *, local: bool = True) -> Starlette:
    """Return the application for a model called `name`.

    With `local`, the Host header of a request must be one of LOCAL_NAMES. This prevents DNS rebinding: another site
    could let its domain name resolve to 127.0.0.1, and its pages could then read the answers of this server.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    page = make_page(name, description)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "local"}

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def show_model(request: Request) -> Response:
        check_model(request.path_params["model"], name)
        return JSONResponse(model)

    async def completions(request: Request) -> Response:
        wanted = parse_request(await read_body(request))
        check_model(wanted.model, name)
        return await answer(request, engine, engine.submit(wanted), name)

    routes = [
        Route("/", show_page),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES if local else ["*"], www_redirect=False)
    handlers: Any = {RequestError: refuse, HTTPException: refuse_http, ClientDisconnect: ignore}
    return Starlette(routes=routes, middleware=[hosts], exception_handlers=handlers, lifespan=lifespan)


def make_page(name: str, description: str) -> str:
    """Return the HTML of the page, including its styles and scripts."""
    page = (HERE / "page.html").read_text(encoding="utf-8")
    values = {
        "name": html.escape(name),
        "heading": html.escape(name).replace("/", "/<wbr>"),  # a long path may break after "/" on a narrow screen
        "description": html.escape(description),
        "style": (REPORT_TEMPLATES / "style.css").read_text(encoding="utf-8"),
        "script": "".join(
            path.read_text(encoding="utf-8") for path in (REPORT_TEMPLATES / "flow.js", HERE / "page.js")
        ),
    }
    for key, value in values.items():
        page = page.replace(f"{{{{ {key} }}}}", value)
    return page


# ---------------------------------------------------------------------------------------------------------------------
# Requests


async def read_body(request: Request) -> bytes:
    """Return the body of a request.

    Raises RequestError if its content type is not JSON, if it is too large, or if it does not arrive in time. JSON is
    required for security: a browser sends no JSON from a page of another website without the server's consent (CORS).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY:
                    body += part
                elif size > MAX_DISCARDED:
                    break
    except TimeoutError:
        raise RequestError(f"the request was not complete after {BODY_SECONDS} seconds", 408) from None
    if size > MAX_BODY:
        raise RequestError(f"the request has more than {MAX_BODY:,} bytes: shorten the prompt", 413)
    if kind != "application/json":
        raise RequestError(f"the content type is {kind!r}, expected application/json", 415)
    return bytes(body)


def check_model(asked: Any, name: str) -> None:
    """Raise RequestError if a request names another model than the one that is served."""
    if asked not in (None, name):
        raise RequestError(f"there is no model {str(asked)[:100]!r} here, only {name!r}", 404)


async def next_event(job: Job) -> Part | None:
    """Return the next part of a job, or None at its end. If the job has failed, raise the exception that ended it."""
    event = await job.events.get()
    if isinstance(event, Exception):
        raise event
    return event


async def cancel_on_disconnect(request: Request, engine: Engine, job: Job) -> None:
    """Cancel a job when its client closes the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)
    engine.cancel(job)


async def answer(request: Request, engine: Engine, job: Job, name: str) -> Response:
    """Return the response to a request in the queue: a stream of events if it asks for one, otherwise one JSON object.

    Raises RequestError if the model cannot answer the request, ClientDisconnect if the job was canceled.
    """
    heading: dict[str, Any] = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
    }
    parts: list[Part] = []
    watcher = asyncio.create_task(cancel_on_disconnect(request, engine, job))
    try:
        part = first = await next_event(job)  # an impossible request fails here, before a stream begins
        while part is not None and not job.request.stream:
            parts.append(part)
            part = await next_event(job)
    finally:
        watcher.cancel()  # from here on, StreamingResponse itself detects whether the client disconnects
    if job.canceled:
        raise ClientDisconnect
    if job.request.stream:
        events = stream_events(engine, job, heading, first)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    completions = join(parts)
    with_logprobs = job.request.logprobs is not None
    heading["choices"] = [choice(completion, with_logprobs=with_logprobs) for completion in completions]
    heading["usage"] = usage(job.prompt_tokens, sum(completion.n_tokens for completion in completions))
    return JSONResponse(heading)


async def stream_events(engine: Engine, job: Job, heading: dict[str, Any], first: Part | None) -> AsyncIterator[str]:
    """Yield server-sent events: the parts, then the error if there is one, or the usage if requested, then "[DONE]".

    `first` is the first part, or None if there is none. If the client disconnects, the job is canceled.
    """
    with_logprobs = job.request.logprobs is not None
    offsets: dict[int, int] = {}
    n_tokens = 0
    event: Part | Exception | None = first
    try:
        while isinstance(event, Part):
            n_tokens += event.n_tokens
            offset = offsets.get(event.number, 0)
            offsets[event.number] = offset + sum(len(token.text) for token in event.tokens)
            yield _event(heading | {"choices": [choice(event, with_logprobs=with_logprobs, offset=offset)]})
            event = await job.events.get()
        if isinstance(event, RequestError):
            yield _event(error_body(str(event)))
        elif event is not None:
            yield _event(error_body("the server failed while it generated this text", "server_error"))
        elif job.request.include_usage:
            yield _event(heading | {"choices": [], "usage": usage(job.prompt_tokens, n_tokens)})
        yield "data: [DONE]\n\n"
    finally:
        engine.cancel(job)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def error_body(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return an error in OpenAI's format. In the message, a lone surrogate, which UTF-8 cannot encode, is escaped."""
    encodable = message.encode(errors="backslashreplace").decode()
    return {"error": {"message": encodable, "type": kind, "param": None, "code": None}}


async def refuse(request: Request, error: RequestError) -> Response:
    """Return the response to a request that is refused."""
    return JSONResponse(error_body(str(error)), error.status)


async def refuse_http(request: Request, error: HTTPException) -> Response:
    """Return the response to a request for an unknown path, or with a method that the path does not support."""
    asked = f"{request.method} {request.url.path}"
    message = f"{asked} does not exist: this server has GET /, GET /v1/models and POST /v1/completions"
    return JSONResponse(error_body(message), error.status_code, headers=error.headers)


async def ignore(request: Request, error: ClientDisconnect) -> Response:
    """Return a response for a client that has disconnected. The client does not receive the response."""
    return Response(status_code=499)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run(args: argparse.Namespace) -> None:
    """Serve the model that the arguments of sample.py select, until Ctrl-C.

    Raises OSError if the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listening = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        raise OSError(
            f"--host {args.host} --port {args.port} cannot be used ({error.strerror}): choose another port or host"
        ) from error
    model, tokenizer, name, size = load(args)
    local = args.host in ("127.0.0.1", "localhost", "::1")
    app = make_app(Engine(model, tokenizer), name, size, local=local)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    shown = f"[{args.host}]" if family == socket.AF_INET6 else args.host
    url = f"http://{shown}:{listening.getsockname()[1]}/"
    lines = [f"{name}: {size}", f"page: {url}    OpenAI's protocol: {url}v1    Ctrl-C ends"]
    if not local:
        lines.append("Every machine that reaches this address can use the model: there is no password.")
    print(*lines, sep="\n", flush=True)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # asyncio warns about each client that disconnects
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
