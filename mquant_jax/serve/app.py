"""The routes of the server as a Starlette application."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mquant_jax.errors import UserError
from mquant_jax.runtime.requests import Answer
from mquant_jax.runtime.requests import Request as Asked
from mquant_jax.serve.errors import ApiError, refusal
from mquant_jax.serve.replies import Reply, event
from mquant_jax.serve.service import Service

log = logging.getLogger(__name__)
_POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"
_DRAINED = 8  # times the limit of a request is read and discarded
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, api_key: str | None = None) -> Starlette:
    """
    Args:
        api_key: key that ``/v1`` and ``/metrics`` require as ``Authorization: Bearer ...``.
    """
    routes = Routes(service, api_key)
    guarded = routes.guarded
    return Starlette(
        routes=[
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/metrics", guarded(routes.metrics)),
            Route("/v1/models", guarded(routes.models)),
            Route("/v1/models/{name:path}", guarded(routes.model)),
            Route("/v1/chat/completions", guarded(routes.chat), methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_failure,
        },
    )  # fmt: skip


class Routes:
    """The endpoints of one service; for arguments see :func:`make_app`."""

    def __init__(self, service: Service, api_key: str | None):
        self.service, self.api_key = service, api_key

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint, protected by the API key."""

        @functools.wraps(endpoint)
        async def checked(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            wanted = f"Bearer {self.api_key}"
            if self.api_key and not secrets.compare_digest(given.encode(), wanted.encode()):
                raise ApiError(401, "the API key is missing or wrong; send it as "
                               "'Authorization: Bearer KEY'", "invalid_api_key",
                               headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
            return await endpoint(request)

        return checked

    async def page(self, request: Request) -> Response:
        html = resources.files("mquant_jax.serve").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": _POLICY})

    async def health(self, request: Request) -> Response:
        closing = self.service.closing
        return JSONResponse({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.service.name:
            raise ApiError(404, f"model {name!a} is not served here; known: {self.service.name}",
                           "model_not_found", "model")  # fmt: skip
        return JSONResponse(self._described())

    async def chat(self, request: Request) -> Response:
        try:
            self.service.admit()
            return await self._asked(request)
        except (ApiError, UserError) as e:
            error = e if isinstance(e, ApiError) else refusal(e)
            self.service.metrics.responses.labels(str(error.status)).inc()
            return _response(error)
        except ClientDisconnect:
            return Response(status_code=499)  # the client is gone

    async def _asked(self, request: Request) -> Response:
        service = self.service
        try:
            asked, submitted = await service.submit(await self._body(request))
        except BaseException:
            service.leave()
            raise
        return _Answering(service, submitted, Reply(service.name, asked.include_usage),
                          asked.stream)  # fmt: skip

    async def _body(self, request: Request) -> bytes:
        """
        Raises:
            ApiError: too large, too slow, or not of the JSON content type. A page of another site
                can send other types without a CORS preflight.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"content-type {kind!a}; expected application/json")
        try:
            async with asyncio.timeout(self.service.limits.body_seconds):
                return await self._read(request)
        except TimeoutError as e:
            raise ApiError(408, "the request did not arrive in time") from e

    async def _read(self, request: Request) -> bytes:
        most = self.service.limits.body_bytes
        body, size = bytearray(), 0
        async for part in request.stream():
            size += len(part)
            if size <= most:
                body += part
            elif size > _DRAINED * most:
                break  # a client that is still sending does not read the error
        if size > most:
            raise ApiError(413, f"the request is larger than {most} bytes; send smaller or fewer "
                           "pictures", "request_too_large",
                           headers={"Connection": "close"})  # fmt: skip
        return bytes(body)

    def _described(self) -> dict[str, object]:
        return {"id": self.service.name, "object": "model", "created": 0, "owned_by": "mquant_jax",
                "max_model_len": self.service.engine.context}  # fmt: skip


class _Answering(Response):
    """Sends an answer; cancels it if the client disconnects."""

    def __init__(self, service: Service, request: Asked, reply: Reply, stream: bool):
        self.service, self.request, self.reply, self.streams = service, request, reply, stream
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            try:
                await work
            except asyncio.CancelledError:
                self._count(499)
            finally:
                self.service.leave()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.service.deltas(self.request)) as deltas:
            if self.streams:
                await self._stream(deltas, send)
                return
            try:
                answer = [item async for item in deltas][-1]
                assert isinstance(answer, Answer)
                response: Response = JSONResponse(self.reply.whole(answer))
            except ApiError as e:
                response = _response(e)
            self._count(response.status_code)
            await response(scope, receive, send)

    async def _stream(self, deltas: AsyncIterator[str | Answer], send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                   (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _more(send, self.reply.begin())
        status = 200
        try:
            async for item in deltas:
                if isinstance(item, Answer):
                    await _more(send, self.reply.end(item))
                else:
                    await _more(send, self.reply.text(item))
        except ApiError as e:
            status = e.status
            await _more(send, event(e.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self._count(status)

    def _count(self, status: int) -> None:
        self.service.metrics.responses.labels(str(status)).inc()


async def _more(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return _response(ApiError(error.status_code, what, headers=error.headers))


async def _on_failure(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return _response(ApiError(500, "internal error; see the server's log", "internal_error"))
