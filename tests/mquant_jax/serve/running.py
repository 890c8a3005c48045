"""A server in a thread of the test process, on a real socket."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from mquant_jax.runtime.engine import Engine
from mquant_jax.serve.server import Server, open_socket, url_of
from mquant_jax.serve.service import Limits, Service

NAME = "tiny"


@contextmanager
def served(
    model: Any,
    engine: Engine,
    grace: int = 30,
    key: str | None = None,
    name: str = NAME,
    **limits: int,
) -> Iterator[tuple[str, Server]]:
    """Run a server in a thread; yield its URL and the server."""
    with open_socket("127.0.0.1", 0) as listening:
        ready = threading.Event()
        service = Service(model, engine, name, Limits(**limits))
        server = Server(service, key, grace, ready.set)
        thread = threading.Thread(target=server.run_on, args=(listening,))
        thread.start()
        try:
            assert ready.wait(60)
            yield url_of(listening), server
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def data_url(picture: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
