"""A checkpoint's score on a benchmark; several checkpoints against the first."""

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
'mquant-jax[eval]'), JSONL; a text for perplexity. Nothing is fetched. Task jsonl takes samples, one
{{"image": "cat.png", "question": "...", "answer": "..."}} per line; --samples FILE is short for
--task jsonl --data FILE. Without --task and --data the demo model's held-out set is used.

With --out, answers are kept as they are made, and a run that was stopped goes on from them.

Batches are cut among all devices of this machine. For several machines, start the same command on
each, with --distributed where JAX finds the others by itself (TPU pods, Slurm, MPI), else with the
three options that tell them; the first prints and keeps the results.
"""


def main(argv: list[str]) -> int:
    """Print scores, and what changed against the first checkpoint."""
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
    add("checkpoint", nargs="+", help="folders written by python -m mquant_jax convert")
    add("--task", metavar="NAME", help="a benchmark, see below (default demo)")
    add("--data", type=Path, metavar="FILE", help="its file, a folder of shards, or a pattern")
    add("--split", metavar="NAME", help="of data with several, such as validation")
    add("--samples", type=Path, metavar="FILE.jsonl", help="short for --task jsonl --data FILE")
    add("--limit", type=int, metavar="N", help="use the first N questions only")
    add("--out", type=Path, metavar="DIR", help="keep answers and results; go on from those there")
    add("--batch-size", type=int, default=50, metavar="N", help="prompts per batch (default 50)")
    add("--max-new-tokens", type=int, metavar="N", help="default: the task's")
    add("--kv-cache", choices=KV_CACHES, default="float", help="default float")
    add(
        "--agreement",
        action="store_true",
        help="also: how often models, fed with the first one's answers, find its next token",
    )
    add(
        "--kl",
        type=int,
        default=0,
        metavar="N",
        help="also: divergence from the first, so fed, on the first N questions; takes 4 bytes x "
        "vocabulary x tokens of their answers on the disk of --out",
    )
    add(
        "--swap-images",
        action="store_true",
        help="also: the score with pictures of other questions: are they looked at?",
    )
    add("--devices", type=int, metavar="N", help="cut batches among N devices (default all)")
    add("--distributed", action="store_true", help="one of several machines that JAX knows")
    add("--coordinator-address", metavar="HOST:PORT", help="of the first machine")
    add("--num-processes", type=int, metavar="N", help="how many machines")
    add("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _devices(wanted: int | None) -> list[Any]:
    """
    Raises:
        UserError: more devices than there are.
    """
    found = jax.local_devices()
    number = len(found) if wanted is None else count(wanted, "devices")
    if number > len(found):
        raise UserError(f"--devices {number}: JAX has {len(found)} here: {found}")
    return found[:number]


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
