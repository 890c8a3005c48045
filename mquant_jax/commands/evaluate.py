"""Score a checkpoint on a benchmark, or compare several checkpoints with the first."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from mquant_jax.cli_support import OK, Parser, add_no_verify, keep_stdout_clean, progress, warn
from mquant_jax.errors import UserError
from mquant_jax.eval import hosts, table
from mquant_jax.eval.evaluation import Checks, Evaluation, ModelResult, evaluate
from mquant_jax.eval.question import Task
from mquant_jax.eval.tasks import TASKS, find_task
from mquant_jax.runtime.generate import KV_CACHES
from mquant_jax.runtime.options import Options
from mquant_jax.validate import count

FLIPS, SUMMARY = "flips.html", "evaluation.json"
EPILOG = """\
tasks:
{tasks}

DATA is the benchmark's file as published: VLMEvalKit's TSV, parquet (pip install
'mquant-jax[eval]') or JSONL; a text for perplexity. Nothing is downloaded. Task jsonl takes
samples, one {{"image": "cat.png", "question": "...", "answer": "..."}} per line; --samples FILE is
short for --task jsonl --data FILE. Without --task and --data the demo model's held-out set is used.

With --out, answers are saved as they are generated, and an interrupted run resumes from them.

Batches are sharded over all devices of this machine. To use several machines, start the same
command on each: with --distributed if JAX can detect the others (TPU pods, Slurm, MPI), otherwise
with --coordinator-address, --num-processes and --process-id. The first prints and saves results.
"""


def main(argv: list[str]) -> int:
    """Print scores, and differences from the first checkpoint."""
    args = _parser().parse_args(argv)
    cluster = (args.coordinator_address, args.num_processes, args.process_id)
    if args.distributed or any(x is not None for x in cluster):
        keep_stdout_clean()
        hosts.join(*cluster)
    task, data = _task(args)
    options = Options(
        task.max_new_tokens or 1 if args.max_new_tokens is None else args.max_new_tokens,
        batch_size=args.batch_size,
        limit=args.limit,
        kv_cache=args.kv_cache,
    )
    result = evaluate(
        args.checkpoint, task, data, options, args.out,
        checks=Checks(args.agreement, args.kl, args.swap_images),
        split=args.split, devices=_devices(args.devices), verify=args.verify, progress=progress,
    )  # fmt: skip
    if hosts.is_first():
        _report(result, args.out, args.json)
    return OK


def _report(result: Evaluation, out: Path | None, as_json: bool) -> None:
    for model in result.models:
        _warn_of_overlap(model, len(result.questions))
    summary = json.dumps(result.to_json())
    if out:
        (out / SUMMARY).write_text(summary + "\n", encoding="utf-8")
    if out and len(result.models) > 1 and result.task.judge is not None:
        table.write_flips(result, out / FLIPS)
    print(summary if as_json else table.text(result))


def _parser() -> Parser:
    tasks = "\n".join(f"  {name:<12} {task.title} ({task.unit})" for name, task in TASKS.items())
    parser = Parser("python -m mquant_jax eval", __doc__ or "", EPILOG.format(tasks=tasks))
    add = parser.add_argument
    add("checkpoint", nargs="+", help="folders written by convert")
    add("--task", metavar="NAME", help="benchmark, see below (default demo)")
    add("--data", type=Path, metavar="FILE", help="its file, a folder of shards, or a pattern")
    add("--split", metavar="NAME", help="split of the data, such as validation")
    add("--samples", type=Path, metavar="FILE.jsonl", help="short for --task jsonl --data FILE")
    add("--limit", type=int, metavar="N", help="use only the first N questions")
    add("--out", type=Path, metavar="DIR", help="save answers and results; resume from saved ones")
    add("--batch-size", type=int, default=50, metavar="N", help="prompts per batch (default 50)")
    add("--max-new-tokens", type=int, metavar="N", help="default: set by the task")
    add("--kv-cache", choices=KV_CACHES, default="float", help="default float")
    add(
        "--agreement",
        action="store_true",
        help="also report how often a model predicts the first model's answer tokens",
    )
    add(
        "--kl",
        type=int,
        default=0,
        metavar="N",
        help="also report the KL divergence from the first model on the first N questions; takes 4 "
        "bytes x vocabulary x answer tokens on the disk of --out",
    )
    add(
        "--swap-images",
        action="store_true",
        help="also report the score with the pictures of other questions",
    )
    add("--devices", type=int, metavar="N", help="shard batches over N devices (default all)")
    add("--distributed", action="store_true", help="run on several machines that JAX detects")
    add("--coordinator-address", metavar="HOST:PORT", help="address of the first machine")
    add("--num-processes", type=int, metavar="N", help="number of machines")
    add("--process-id", type=int, metavar="I", help="index of this machine, from 0")
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _devices(wanted: int | None) -> list[Any]:
    """
    Raises:
        UserError: more devices than available.
    """
    found = jax.local_devices()
    number = len(found) if wanted is None else count(wanted, "devices")
    if number > len(found):
        raise UserError(f"--devices {number}: JAX has {len(found)} here: {found}")
    return found[:number]


def _warn_of_overlap(model: ModelResult, n: int) -> None:
    found = model.overlap
    if found and (found["pictures"] or found["both"]):
        warn(f"{model.path}: {found['pictures']} of {n} questions have a picture from the "
             f"calibration data, {found['both']} of them with the same question; the score may be "
             "too high", "calibration")  # fmt: skip


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
