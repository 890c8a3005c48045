"""Chat with a converted model about pictures."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from mquant_jax.api import Model, load
from mquant_jax.cli_support import FAILED, OK, Parser, add_no_verify, utf8
from mquant_jax.errors import UserError
from mquant_jax.models.images import load_image
from mquant_jax.runtime.chats import MAX_NEW_TOKENS, chat_options
from mquant_jax.runtime.generate import KV_CACHES
from mquant_jax.runtime.options import Options

EPILOG = """\
Every line is a message. Commands:
  /image PATH   add a picture to the next message (repeatable)
  /reset        start a new conversation
  /exit         quit, as at the end of the input

examples:
  python -m mquant_jax chat DST --image cat.png
  printf 'What is this?\\nWhat colour is it?\\n' | python -m mquant_jax chat DST --image cat.png
"""
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_new_tokens")


def main(argv: list[str]) -> int:
    """Stream each answer. Exit status 1 if a message failed that was not typed at a terminal."""
    parser = Parser("python -m mquant_jax chat", __doc__, EPILOG)
    add = parser.add_argument
    add("checkpoint", help="folder written by convert")
    add("--image", action="append", default=[], metavar="FILE", help="picture for the first "
        "message (repeatable)")  # fmt: skip
    add("--system", type=utf8, help="system message")
    add("--max-new-tokens", type=int, metavar="N", help=f"default {MAX_NEW_TOKENS}")
    add("--temperature", type=float, help="0 is greedy; this and the following options default "
        "to the model's generation_config.json")  # fmt: skip
    add("--top-k", type=int, help="keep the k most likely tokens; 0 keeps all")
    add("--top-p", type=float, help="keep top tokens of this probability; 1 keeps all")
    add("--repetition-penalty", type=float, help="1 for none")
    add("--seed", type=int, help="sampling seed; default: a new one for each answer")
    add("--kv-cache", choices=KV_CACHES, default="float",
        help="int8 stores keys and values in a half to a quarter of the memory")  # fmt: skip
    add_no_verify(parser)
    args = parser.parse_args(argv)
    options = Options(kv_cache=args.kv_cache)
    for i, image in enumerate(args.image):
        load_image(image, f"image {i}")
    model = load(args.checkpoint, kv_cache=options.kv_cache, verify=args.verify)
    sampling = {name: getattr(args, name) for name in _SAMPLING}
    chat_options(model.processor, sampling)
    talk = Conversation(model, args.system, args.image, sampling)
    good = all([_turn(talk, line) for line in _lines()])
    return OK if good or sys.stdin.isatty() else FAILED


@dataclasses.dataclass
class Conversation:
    """The messages so far, and the pictures for the next one.

    Attributes:
        system: the system message, if any.
        options: options of :meth:`Model.chat`.
    """

    model: Model
    system: str | None
    images: list[str]
    options: dict[str, Any]
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def ask(self, text: str) -> None:
        """Stream the answer; if it fails, the question and its pictures are dropped."""
        parts = [{"type": "image", "image": image} for image in self.images]
        self.images = []
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        system = [{"role": "system", "content": self.system}] if self.system else []
        answer = self.model.chat(
            [*system, *self.messages, question],
            stream=lambda new: print(new, end="", flush=True),
            **self.options,
        )
        print(flush=True)
        self.messages += [question, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages, self.images = [], []


def _lines() -> Any:
    """Lines of the input until its end or ``/exit``; shows a prompt on a terminal."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def _turn(talk: Conversation, line: str) -> bool:
    """Handle one line of the input; returns whether it succeeded."""
    command, _, rest = line.partition(" ")
    try:
        if command == "/image":
            load_image(rest.strip(), "/image")
            talk.images.append(rest.strip())
        elif command == "/reset":
            talk.reset()
        elif line.startswith("/") and command[1:].isalpha():
            raise UserError(f"unknown command {command}; known: /image PATH, /reset, /exit")
        else:
            talk.ask(line)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return False
    return True
