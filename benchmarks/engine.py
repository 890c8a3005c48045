"""The engine against one-by-one ``generate`` and against exact shapes, and its memory over time.

    python -m benchmarks.engine [--model 2b] [--requests 1000] [--concurrent 16] [--plot FILE]

Prompts and weights are those of benchmarks.soak, and so are the lengths of the answers (1 to 48
tokens) unless ``--new-tokens`` says one for all; nothing stops an answer early. Three measurements,
each left out where its number is 0:

``--compare N``   N prompts through ``generate``, one after the other, and through an engine,
                  ``--concurrent`` at a time, in turns: seconds and processor seconds (the least of
                  two warm runs each), tokens per second, and how many greedy answers are equal: to
                  those of ``generate`` and to those of the engine with one request at a time. Where
                  one differs from ``generate``'s, the margin says by how much the log-probability
                  of the first token that differs was ahead of the next one's
``--exact N``     N mixed requests (one to eight prompts each) through programs of exactly their
                  size, and the same prompts through an engine: mean seconds a request
``--requests N``  N prompts through one engine that keeps pictures and prompts: memory is flat if
                  the last tenth needs no more than the tenth in the middle

All times are of warm programs, and those of the first two without reuse.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import soak
from benchmarks.output import add_output_options, deliver
from mquant_jax.api import Model
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.commands.bench import machine
from mquant_jax.errors import UserError
from mquant_jax.eval.speed import NEVER_STOP
from mquant_jax.models.base import Prompt
from mquant_jax.runtime.engine import Engine
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.programs import Programs
from mquant_jax.runtime.requests import Answer, Request, RequestOptions

MODELS = {"demo": "demo", "2b": "qwen2_vl-2b"}
Job = tuple[Prompt, int]  # and the length of its answer


def answers(engine: Engine, jobs: Iterable[Job], concurrent: int) -> Iterator[Answer]:
    """The answers to ``jobs``, in their order, so many at a time."""
    open_requests: deque[Request] = deque()
    for prompt, new_tokens in jobs:
        if len(open_requests) == concurrent:
            yield open_requests.popleft().result()
        open_requests.append(engine.submit(prompt, RequestOptions(max_new_tokens=new_tokens)))
    for request in open_requests:
        yield request.result()


def jobs_of(requests: Iterable[soak.Request]) -> Iterator[Job]:
    for request in requests:
        yield from ((prompt, request.new_tokens) for prompt in request.prompts)


def timed(run) -> tuple[float, Any]:
    """Seconds and result of the second of two runs."""
    run()
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def compare(model: Model, engine: Engine, jobs: list[Job], concurrent: int) -> dict[str, Any]:
    """One by one against all together."""
    generator = model.generator

    def one_by_one() -> list[list[int]]:
        return [
            generator.generate(model.processor.collate([prompt]), n).tokens[0]
            for prompt, n in progress(jobs, "one by one")
        ]

    def together() -> list[list[int]]:
        return [a.tokens for a in answers(engine, progress(jobs, "engine"), concurrent)]

    expected, got = one_by_one(), together()
    alone = [a.tokens for a in answers(engine, progress(jobs, "engine, one at a time"), 1)]
    (serial, serial_cpu), (seconds, cpu) = least_times([one_by_one, together])
    tokens = sum(map(len, got))
    return {
        "requests": len(jobs), "tokens": tokens, "one_by_one_seconds": serial,
        "engine_seconds": seconds, "one_by_one_cpu_seconds": serial_cpu, "engine_cpu_seconds": cpu,
        "one_by_one_rate": tokens / serial, "rate": tokens / seconds,
        "speedup": serial / seconds, "cpu_speedup": serial_cpu / cpu,
        "equal": sum(a == b for a, b in zip(expected, got, strict=True)),
        "equal_to_engine_alone": sum(a == b for a, b in zip(alone, got, strict=True)),
        "margins": [
            margin(model, prompt, a, b)
            for (prompt, _), a, b in zip(jobs, expected, got, strict=True) if a != b
        ],
    }  # fmt: skip


def least_times(runs: list[Callable[[], object]], turns: int = 2) -> list[tuple[float, float]]:
    """Seconds and processor seconds of each run, the least of so many, in turns: what else the
    machine does falls on all of them."""
    found: list[list[tuple[float, float]]] = [[] for _ in runs]
    for _ in range(turns):
        for run, times in zip(runs, found, strict=True):
            began, cpu = time.perf_counter(), time.process_time()
            run()
            times.append((time.perf_counter() - began, time.process_time() - cpu))
    return [(min(t for t, _ in times), min(c for _, c in times)) for times in found]


def margin(model: Model, prompt: Prompt, expected: list[int], got: list[int]) -> float:
    """How far the likeliest token is ahead of the second, in log-probability, where two answers
    part."""
    at = next(i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b)
    steps = model.generator.force(model.processor.collate([prompt]), [expected[:at]])
    second, first = np.sort(list(steps)[at][0])[-2:]
    return float(first - second)


def exact(
    model: Model, engine: Engine, requests: list[soak.Request], concurrent: int
) -> dict[str, Any]:
    """Programs of each request's own size against the engine's few."""
    own = [soak.exact_seconds(model, r) for r in progress(requests, "exact shapes")]

    def alone() -> None:
        for request in progress(requests, "engine, one request at a time"):
            list(answers(engine, jobs_of([request]), len(request.prompts)))

    def together() -> None:
        list(answers(engine, jobs_of(progress(requests, "engine")), concurrent))

    mean = statistics.mean(own)
    one, all_ = timed(alone)[0] / len(requests), timed(together)[0] / len(requests)
    return {
        "requests": len(requests), "exact_mean": mean, "alone_mean": one, "mean": all_,
        "ratio_alone": one / mean, "ratio": all_ / mean,
    }  # fmt: skip


def memory(model: Model, engine: Engine, rng, count: int, concurrent: int) -> list[dict]:
    """The long run: one row a request."""
    generator, rows = model.generator, []

    def jobs() -> Iterator[Job]:
        for _ in range(count):
            request = soak.random_request(model, rng, prompts=1)
            yield request.prompts[0], request.new_tokens

    began, compiled = time.perf_counter(), generator.programs.compiled
    for _ in progress(answers(engine, jobs(), concurrent), "request"):
        rows.append(soak.usage(generator, began, compiled))
        began, compiled = time.perf_counter(), generator.programs.compiled
    return rows


def table(result: dict[str, Any]) -> str:
    lines = []
    if c := result["comparison"]:
        lines.append(
            f"{c['requests']} requests: one by one {c['one_by_one_seconds']:.2f} s "
            f"({c['one_by_one_rate']:.1f} tokens/s), engine {c['engine_seconds']:.2f} s "
            f"({c['rate']:.1f} tokens/s), {c['speedup']:.2f} x ({c['cpu_speedup']:.2f} x in "
            f"processor time); of the greedy answers {c['equal']} are those of generate, "
            f"{c['equal_to_engine_alone']} those of the engine with one request at a time"
        )
    if e := result["exact"]:
        lines.append(
            f"mean of {e['requests']} mixed requests: exact shapes {e['exact_mean']:.2f} s, engine "
            f"{e['mean']:.2f} s (ratio {e['ratio']:.2f}), one request at a time "
            f"{e['alone_mean']:.2f} s ({e['ratio_alone']:.2f})"
        )
    return "\n".join(lines + soak.summary_lines(result))


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.engine", __doc__ or "")
    add = parser.add_argument
    add("--model", choices=MODELS, default="demo", help="layer shapes (default demo)")
    add("--layers", type=int, default=4, metavar="N", help="layers of each tower (4; not demo)")
    add("--compare", type=int, default=32, metavar="N", help="prompts, both ways (default 32)")
    add("--exact", type=int, default=0, metavar="N", help="requests, both ways (default 0)")
    add("--requests", type=int, default=0, metavar="N", help="the long run (default 0)")
    add("--concurrent", type=int, default=16, metavar="N", help="requests at a time (default 16)")
    add("--new-tokens", type=int, metavar="N", help="of every answer to compare (default 1 to 48)")
    add("--slots", type=int, default=8, metavar="N", help="of the engine (default 8)")
    add("--seed", type=int, default=0, help="of the requests")
    add("--plot", type=Path, metavar="FILE", help="draw memory and programs (PNG)")
    add_output_options(parser)
    args = parser.parse_args(argv)
    for name in ("compare", "exact", "requests"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} must be 0 or more")
    if args.new_tokens is not None and args.new_tokens < 1:
        raise UserError("--new-tokens must be 1 or more")
    if args.concurrent < 1:
        raise UserError("--concurrent must be 1 or more")
    if args.plot and not args.requests:
        raise UserError("--plot draws the long run: ask for --requests")
    deliver(_measured(args), args, table)
    return OK


def _measured(args) -> dict[str, Any]:
    model = soak.random_weights(MODELS[args.model], args.layers)
    model._generator = Generator(model.module, NEVER_STOP, programs=Programs())
    rng = np.random.default_rng(args.seed)
    result: dict[str, Any] = {
        "machine": machine(), "model": args.model, "layers": args.layers, "seed": args.seed,
        "slots": args.slots, "concurrent": args.concurrent, "new_tokens": args.new_tokens,
        "comparison": None, "exact": None,
        "limit": model.generator.programs.limit,
    }  # fmt: skip
    if args.compare or args.exact:
        with Engine(model, slots=args.slots, reuse_bytes=0) as engine:
            if args.compare:
                some = [soak.random_request(model, rng, prompts=1) for _ in range(args.compare)]
                jobs = [(p, args.new_tokens or n) for p, n in jobs_of(some)]
                result["comparison"] = compare(model, engine, jobs, args.concurrent)
            if args.exact:
                some = [soak.random_request(model, rng) for _ in range(args.exact)]
                result["exact"] = exact(model, engine, some, args.concurrent)
    rows: list[dict] = []
    if args.requests:
        with Engine(model, slots=args.slots) as engine:
            rows = memory(model, engine, rng, args.requests, args.concurrent)
    result |= {"summary": soak.summary(rows) if rows else None, "rows": rows}
    if args.plot:
        soak.plot(result, args.plot)
    return result


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
