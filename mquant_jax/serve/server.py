"""The server process: socket, readiness and graceful shutdown."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from mquant_jax.errors import UserError
from mquant_jax.serve.app import make_app
from mquant_jax.serve.service import Service
from mquant_jax.validate import count

_MORE_SECONDS = 5  # to send the last bytes of cancelled answers


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free port.

    Raises:
        UserError: the address is not available.
    """
    port = count(port, "--port", 0, 65535)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        why = getattr(e, "strerror", None) or e
        raise UserError(f"--host {host} --port {port}: cannot listen there: {why}; "
                        "choose another port, or 0 for any free one") from e  # fmt: skip


def url_of(listening: socket.socket) -> str:
    """The URL of the socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves one service on one socket until it is stopped.

    On shutdown it refuses new requests, lets open ones finish for a while, and then fails them.

    Args:
        api_key: see :func:`make_app`.
        grace: seconds that open requests get on shutdown.
        on_ready: called when the server accepts requests.
    """

    def __init__(
        self,
        service: Service,
        api_key: str | None = None,
        grace: int = 30,
        on_ready: Callable[[], None] = lambda: None,
    ):
        app = make_app(service, api_key)
        super().__init__(uvicorn.Config(
            app, log_config=None, log_level="error", access_log=False, lifespan="off",
            http="h11", ws="none", timeout_graceful_shutdown=grace + _MORE_SECONDS,
        ))  # fmt: skip
        self.service, self.grace, self.on_ready = service, grace, on_ready

    def run_on(self, listening: socket.socket) -> None:
        """Serve until SIGINT or SIGTERM, or until ``should_exit`` is set from another thread."""
        try:
            self.run(sockets=[listening])
        except KeyboardInterrupt:
            pass  # uvicorn raises the signal again after a clean shutdown
        finally:
            self.service.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.closing = True
        asyncio.get_running_loop().call_later(self.grace, self.service.cancel_all)
        await super().shutdown(sockets)
