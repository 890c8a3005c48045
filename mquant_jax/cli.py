"""``python -m mquant_jax COMMAND``: one module per command, imported on use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import mquant_jax
from mquant_jax.cli_support import OK, run_cli
from mquant_jax.compile_cache import keep_compiled_programs
from mquant_jax.errors import UserError

COMMANDS = {
    "convert": "convert a Hugging Face model to a float or quantised checkpoint",
    "verify": "check a checkpoint's files, source and outputs",
    "demo": "convert the bundled model to W4A8 and compare it with float",
    "generate": "ask a converted model about pictures",
    "chat": "chat with a converted model about pictures",
    "serve": "serve OpenAI's API and a web page to try it",
    "eval": "score checkpoints on benchmarks and compare them",
    "bench": "compare speed with float32 and bfloat16 versions of the model",
    "report": "write a report with plots on a checkpoint's quantisation",
    "inspect": "show a checkpoint's contents and each layer's kernel",
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
