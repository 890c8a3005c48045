"""Ask a converted model a question about pictures."""

from __future__ import annotations

import dataclasses
import json

import jax

from mquant_jax.api import load
from mquant_jax.cli_support import OK, Parser, add_no_verify, utf8
from mquant_jax.runtime.generate import KV_CACHES
from mquant_jax.runtime.options import Options
from mquant_jax.runtime.sampling import Sampling

EPILOG = """\
examples:
  python -m mquant_jax generate DST --image cat.png --prompt "What is this?"
  python -m mquant_jax generate DST --image a.png --image b.png --prompt "What differs?"
  python -m mquant_jax generate DST --prompt "Tell me a story." --temperature 0.8 --seed 3
"""


def main(argv: list[str]) -> int:
    """Stream the answer, or with ``--json`` print one object with timings."""
    parser = Parser("python -m mquant_jax generate", __doc__, EPILOG)
    add = parser.add_argument
    add("checkpoint", help="folder written by convert")
    add("--image", action="append", default=[], metavar="FILE", help="picture (repeatable)")
    add("--prompt", required=True, type=utf8, help="the question")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--top-k", type=int, default=0, help="keep the k most likely tokens; 0 keeps all")
    add("--top-p", type=float, default=1.0, help="keep top tokens of this probability; 1 keeps all")
    add("--seed", type=int, default=0, help="sampling seed")
    add("--kv-cache", choices=KV_CACHES, default="float",
        help="int8 stores keys and values in a half to a quarter of the memory")  # fmt: skip
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    options = Options(
        args.max_new_tokens,
        Sampling(args.temperature, args.top_k, args.top_p),
        seed=args.seed,
        kv_cache=args.kv_cache,
    )
    model = load(args.checkpoint, kv_cache=options.kv_cache, verify=args.verify)
    stream = None if args.json else lambda text: print(text, end="", flush=True)
    answer = model.generate(
        args.image,
        args.prompt,
        max_new_tokens=options.max_new_tokens,
        **dataclasses.asdict(options.sampling),
        key=jax.random.key(options.seed),
        stream=stream,
    )
    print(json.dumps({"prompt": args.prompt, "answer": answer}) if args.json else "")
    return OK
