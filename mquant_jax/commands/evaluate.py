"""A checkpoint's score on a benchmark; several checkpoints against the first."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mquant_jax.cli_support import OK, Parser, add_no_verify, progress, warn
from mquant_jax.errors import UserError
from mquant_jax.eval import table
from mquant_jax.eval.evaluation import ModelResult, evaluate
from mquant_jax.eval.question import Task
from mquant_jax.eval.tasks import TASKS, find_task
from mquant_jax.runtime.generate import KV_CACHES
from mquant_jax.runtime.options import Options

FLIPS, SUMMARY = "flips.html", "evaluation.json"
EPILOG = """\
tasks:
{tasks}

DATA is the benchmark's file as published: VLMEvalKit's TSV, parquet (pip install
'mquant-jax[eval]'), JSONL; a text for perplexity. Nothing is fetched. Task jsonl takes samples, one
{{"image": "cat.png", "question": "...", "answer": "..."}} per line; --samples FILE is short for
--task jsonl --data FILE. Without --task and --data the demo model's held-out set is used.

With --out, answers are kept as they are made, and a run that was stopped goes on from them.
"""


def main(argv: list[str]) -> int:
    """Print scores, and what changed against the first checkpoint."""
    args = _parser().parse_args(argv)
    task, data = _task(args)
    options = Options(
        task.max_new_tokens or 1 if args.max_new_tokens is None else args.max_new_tokens,
        batch_size=args.batch_size,
        limit=args.limit,
        kv_cache=args.kv_cache,
    )
    result = evaluate(
        args.checkpoint, task, data, options, args.out, verify=args.verify, progress=progress
    )
    for model in result.models:
        _warn_of_overlap(model, len(result.questions))
    summary = json.dumps(result.to_json())
    if args.out:
        (args.out / SUMMARY).write_text(summary + "\n", encoding="utf-8")
    if args.out and len(result.models) > 1 and task.judge is not None:
        table.write_flips(result, args.out / FLIPS)
    print(summary if args.json else table.text(result))
    return OK


def _parser() -> Parser:
    tasks = "\n".join(f"  {name:<12} {task.title} ({task.unit})" for name, task in TASKS.items())
    parser = Parser("python -m mquant_jax eval", __doc__ or "", EPILOG.format(tasks=tasks))
    add = parser.add_argument
    add("checkpoint", nargs="+", help="folders written by python -m mquant_jax convert")
    add("--task", metavar="NAME", help="a benchmark, see below (default demo)")
    add("--data", type=Path, metavar="FILE", help="the benchmark's file")
    add("--samples", type=Path, metavar="FILE.jsonl", help="short for --task jsonl --data FILE")
    add("--limit", type=int, metavar="N", help="use the first N questions only")
    add("--out", type=Path, metavar="DIR", help="keep answers and results; go on from those there")
    add("--batch-size", type=int, default=50, metavar="N", help="prompts per batch (default 50)")
    add("--max-new-tokens", type=int, metavar="N", help="default: the task's")
    add("--kv-cache", choices=KV_CACHES, default="float", help="default float")
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _warn_of_overlap(model: ModelResult, n: int) -> None:
    found = model.overlap
    if found and (found["pictures"] or found["both"]):
        warn(f"{model.path}: {found['pictures']} of {n} questions have a picture like one that the "
             f"model was calibrated on, {found['both']} of them the same question, too; its score "
             "may flatter it", "calibration")  # fmt: skip


def _task(args: argparse.Namespace) -> tuple[Task, Path | None]:
    """
    Raises:
        UserError: an unknown task, or options that contradict each other.
    """
    if args.samples is None:
        return find_task(args.task or ("demo" if args.data is None else "jsonl")), args.data
    if args.data is not None or args.task not in (None, "jsonl"):
        raise UserError("--samples FILE is short for --task jsonl --data FILE; give one of them")
    return find_task("jsonl"), args.samples
