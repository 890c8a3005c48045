"""Ask a converted model about pictures."""

from __future__ import annotations

import json

import jax

from mquant_jax.api import load
from mquant_jax.cli_support import OK, Parser, add_no_verify
from mquant_jax.runtime.generate import KV_CACHES

EPILOG = """\
examples:
  python -m mquant_jax generate DST --image cat.png --prompt "What is this?"
  python -m mquant_jax generate DST --image a.png --image b.png --prompt "What differs?"
  python -m mquant_jax generate DST --prompt "Tell me a story." --temperature 0.8 --seed 3
"""


def main(argv: list[str]) -> int:
    """Print the answer, token by token; with ``--json`` one object with timings."""
    parser = Parser("python -m mquant_jax generate", __doc__, EPILOG)
    add = parser.add_argument
    add("checkpoint", help="folder written by convert.hf_to_flax")
    add("--image", action="append", default=[], metavar="FILE", help="a picture (repeatable)")
    add("--prompt", required=True, help="the question")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    add("--top-p", type=float, default=1.0, help="keep this much probability; 1 keeps all")
    add("--seed", type=int, default=0, help="seed of the sampling key")
    add("--kv-cache", choices=KV_CACHES, default="float",
        help="int8 keeps keys and values in a half to a quarter of the memory")  # fmt: skip
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    model = load(args.checkpoint, kv_cache=args.kv_cache, verify=args.verify)
    stream = None if args.json else lambda text: print(text, end="", flush=True)
    answer = model.generate(
        args.image,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        key=jax.random.key(args.seed),
        stream=stream,
    )
    print(json.dumps({"prompt": args.prompt, "answer": answer}) if args.json else "")
    return OK
