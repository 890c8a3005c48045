"""Serve chat requests in OpenAI's API format, and a web page to try it."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from mquant_jax.api import load
from mquant_jax.cli_support import OK, Parser, add_no_verify, progress, warn
from mquant_jax.errors import UserError
from mquant_jax.runtime.chats import MAX_NEW_TOKENS
from mquant_jax.runtime.engine import Engine
from mquant_jax.runtime.generate import KV_CACHES
from mquant_jax.runtime.options import Options
from mquant_jax.validate import count

KEY_VARIABLE = "MQUANT_API_KEY"
EPILOG = f"""\
  POST /v1/chat/completions   text and pictures (data: URLs), streamed or not
  GET  /v1/models             the served model
  GET  /health, /metrics      for health checks and Prometheus
  GET  /                      web page: drop pictures, ask, watch the answer

A line with the URL shows that the server is ready. On SIGTERM or Ctrl-C it refuses new requests,
finishes the open ones and exits. docs/serving.md has examples for clients.

examples:
  python -m mquant_jax serve DST --port 8000
  {KEY_VARIABLE}=secret python -m mquant_jax serve DST --host 0.0.0.0 --slots 16
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "DST", "messages": [{{"role": "user", "content": "Hello"}}]}}'
"""


def main(argv: list[str]) -> int:
    """Serve until a signal."""
    args = _parser().parse_args(argv)
    try:
        from mquant_jax.serve.server import Server, open_socket, url_of
        from mquant_jax.serve.service import Limits, Service
    except ImportError as e:
        raise UserError(f"serve needs the package {e.name}: pip install 'mquant-jax[serve]'") from e
    requests = count(args.slots, "--slots") + count(args.queue, "--queue")
    body = count(args.max_body_mb, "--max-body-mb") << 20
    limits = Limits(body, args.max_pixels, args.max_prompt_tokens, args.max_new_tokens, requests)
    options = Options(kv_cache=args.kv_cache)
    grace = count(args.grace, "--grace", least=0)
    key = args.api_key or os.environ.get(KEY_VARIABLE)
    if not (key or _is_local(args.host)):
        warn(f"--host {args.host} is reachable from other machines, without an --api-key")
    with open_socket(args.host, args.port) as listening:
        model = load(args.checkpoint, kv_cache=options.kv_cache, verify=args.verify)
        name = args.name or Path(args.checkpoint).resolve().name
        with Engine(model, slots=args.slots, context=args.context, queue=args.queue) as engine:
            service = Service(model, engine, name, limits)
            service.warm_up()
            if args.warm_up:
                engine.warm_up(progress=progress)
            ready = f"serving {name} on {url_of(listening)}"
            Server(service, key, grace, lambda: print(ready, flush=True)).run_on(listening)
    return OK


def _parser() -> Parser:
    parser = Parser("python -m mquant_jax serve", __doc__, EPILOG)
    add = parser.add_argument
    add("checkpoint", help="folder written by convert")
    add("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine "
        "only; 0.0.0.0: all addresses")  # fmt: skip
    add("--port", type=int, default=8000, help="default 8000; 0: any free port")
    add("--api-key", metavar="KEY", help=f"key that clients must send; default: ${KEY_VARIABLE}")
    add("--name", help="model name for clients; default: the folder's name")
    add("--slots", type=int, default=8, metavar="N", help="requests decoded together")
    add("--context", type=int, metavar="TOKENS",
        help="length of a prompt and its answer; default: the model's, at most 4096")  # fmt: skip
    add("--queue", type=int, default=256, metavar="N",
        help="requests that may wait; further ones are refused (429)")  # fmt: skip
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N",
        help=f"default length limit of an answer; default {MAX_NEW_TOKENS}")  # fmt: skip
    add("--max-prompt-tokens", type=int, metavar="N",
        help="per prompt, including its pictures; default: the context")  # fmt: skip
    add("--max-pixels", type=int, default=64 << 20, metavar="N",
        help="total over the pictures of a request; default 67108864")  # fmt: skip
    add("--max-body-mb", type=int, default=64, metavar="MB", help="size of a request; default 64")
    add("--grace", type=int, default=30, metavar="SECONDS",
        help="time for open requests on shutdown; default 30")  # fmt: skip
    add("--warm-up", action="store_true",
        help="compile for prompts of up to 512 tokens before the first request")  # fmt: skip
    add("--kv-cache", choices=KV_CACHES, default="float",
        help="int8 stores keys and values in a half to a quarter of the memory")  # fmt: skip
    add_no_verify(parser)
    return parser


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
