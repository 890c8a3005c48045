"""Exact match of a checkpoint's answers on picture-and-question samples."""

from __future__ import annotations

import json
from pathlib import Path

from mquant_jax.api import load
from mquant_jax.cli_support import OK, Parser, add_no_verify, progress
from mquant_jax.eval.exact_match import evaluate
from mquant_jax.runtime.generate import KV_CACHES
from mquant_jax.runtime.options import Options
from mquant_jax.samples import BUNDLED_HELDOUT, read_samples

EPILOG = """\
The samples are JSONL, one {"image": "cat.png", "question": "...", "answer": "..."} per line,
pictures relative to the file or in base64; conversations in LLaVA's form and chat "messages" are
read, too. By default the held-out set bundled with the demo model is used.
"""


def main(argv: list[str]) -> int:
    """Print the score, overall and by task."""
    parser = Parser("python -m mquant_jax eval", __doc__, EPILOG)
    add = parser.add_argument
    add("checkpoint", help="folder written by convert.hf_to_flax")
    add("--samples", type=Path, default=BUNDLED_HELDOUT, metavar="FILE.jsonl")
    add("--limit", type=int, metavar="N", help="use the first N samples only")
    add("--batch-size", type=int, default=50, metavar="N", help="prompts per batch (default 50)")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="default 16")
    add("--kv-cache", choices=KV_CACHES, default="float", help="default float")
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    options = Options(
        args.max_new_tokens,
        batch_size=args.batch_size,
        limit=args.limit,
        kv_cache=args.kv_cache,
    )
    samples = read_samples(args.samples, options.limit)
    result = evaluate(
        load(args.checkpoint, kv_cache=options.kv_cache, verify=args.verify),
        samples,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        progress=progress,
    )
    if args.json:
        print(json.dumps(
            {"exact_match": result.score, "n": len(samples), "by_task": result.by_task()}
        ))  # fmt: skip
        return OK
    for task, score in result.by_task().items():
        print(f"{task or 'all':<12} {100 * score:6.1f} %")
    print(f"{'exact match':<12} {100 * result.score:6.1f} %  of {len(samples)}")
    return OK
