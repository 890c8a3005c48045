"""``python -m mquant_jax COMMAND``: one module per command, imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import mquant_jax
from mquant_jax.cli_support import OK, run_cli
from mquant_jax.compile_cache import keep_compiled_programs
from mquant_jax.errors import UserError

COMMANDS = {
    "convert": "convert a Hugging Face model into a checkpoint, float or quantised",
    "verify": "check a checkpoint: files, source, and its outputs against recorded ones",
    "demo": "convert the bundled model to W4A8, compare it with float, draw a contact sheet",
    "generate": "ask a converted model about pictures",
    "chat": "talk with a converted model about pictures",
    "serve": "answer requests in the form of OpenAI's interface, and show a page to try it",
    "eval": "scores on benchmarks, and what changed between checkpoints",
    "bench": "prefill and decode speed against float32 and bfloat16 of the same model",
    "report": "what quantisation did to a checkpoint, as a page with pictures",
    "inspect": "what a checkpoint holds and which kernel each layer runs",
}
_MODULES = {"eval": "evaluate"}


def usage() -> str:
    lines = [
        "usage: python -m mquant_jax COMMAND [options]",
        "",
        "Multimodal language models in JAX with 4-bit weights and static 8-bit activations.",
        "",
        "commands:",
        *(f"  {name:<9} {text}" for name, text in COMMANDS.items()),
        "",
        "python -m mquant_jax COMMAND --help explains one command.",
    ]
    return "\n".join(lines)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return OK
    if argv[0] == "--version":
        print(mquant_jax.__version__)
        return OK
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    keep_compiled_programs()
    module = importlib.import_module(f"mquant_jax.commands.{_MODULES.get(name, name)}")
    return module.main(argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 success, 1 a failed check, 2 bad usage or input."""
    return run_cli(_dispatch, sys.argv[1:] if argv is None else argv)
