"""Run a long mixed load in one process: memory, memory maps, compiled programs, cost of padding.

    python -m benchmarks.soak [--requests 1000] [--model qwen2_vl-2b] [--json] [--plot FILE]

Each request has one to eight prompts of 2 to 120 words, each with up to two pictures of 28 to 500
pixels a side, and asks for 1 to 48 tokens. Weights are random, quantised to W4A8, and no answer
stops early. ``demo`` has the layer shapes of the bundled model. ``qwen2_vl-2b`` has those of
Qwen2-VL-2B, with both towers cut to ``--layers``.

First, ``--exact`` requests are timed warm in two ways: through programs of exactly their shapes
(one for pictures and prompts, one for decoding, all rows padded to the longest), and as
``generate`` runs them. The ratio compares the mean times. Then comes the long run. Memory is flat
if the last tenth of the requests uses no more than the middle tenth. Linux only: memory is read
from /proc.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.output import add_output_options, deliver
from benchmarks.random_checkpoint import cut_config
from benchmarks.speed import random_model
from mquant_jax.api import Model
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.commands.bench import machine
from mquant_jax.errors import UserError
from mquant_jax.eval.speed import NEVER_STOP, Greedy
from mquant_jax.models.base import Prompt
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.presets import PRESETS
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.programs import Programs
from mquant_jax.samples import DEMO_ASSETS

MODELS = ("demo", "qwen2_vl-2b", "qwen2_vl-7b")
DEMO = DEMO_ASSETS / "model"


@dataclasses.dataclass(frozen=True)
class Request:
    prompts: list[Prompt]
    new_tokens: int


def random_weights(name: str, layers: int) -> Model:
    """Return the model with random weights and the demo model's processor."""
    if name == "demo":
        hf = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    else:
        hf = cut_config(name, layers, 151936)
    config = FAMILY.config_from_hf(hf)
    language = dataclasses.replace(config.language, tied_head=False)
    config = dataclasses.replace(config, language=language)
    module = random_model(FAMILY, config, PRESETS["w4a8"], jnp.float32)
    return Model(module, config, {}, FAMILY.processor(DEMO, config))


def random_request(model: Model, rng: np.random.Generator, prompts: int | None = None) -> Request:
    """A request of so many prompts; ``None``: any number."""

    def prompt() -> Prompt:
        letters = rng.integers(97, 123, (rng.integers(2, 121), 4)).astype(np.uint8)
        text = " ".join(bytes(word[: rng.integers(1, 5)]).decode() for word in letters)
        sides = rng.integers(28, 501, (rng.integers(0, 3), 2))
        images = [rng.integers(0, 256, (*side, 3), np.uint8) for side in sides]
        return model.processor.prompt(text, images)

    count = rng.integers(1, 9) if prompts is None else prompts
    return Request([prompt() for _ in range(count)], int(rng.integers(1, 49)))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_maps() -> int:
    with open("/proc/self/maps", "rb") as file:
        return sum(1 for _ in file)


def timed(run) -> float:
    """Return the time of the second of two runs, in seconds."""
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def exact_seconds(model: Model, request: Request) -> float:
    """Time a request through programs of exactly its shapes."""
    greedy = Greedy(model.module, request.new_tokens)

    def run() -> None:
        greedy.prefill(model.processor.collate(request.prompts))
        greedy.decode(jnp.int32(request.new_tokens))

    seconds = timed(run)
    jax.clear_caches()
    return seconds


def padded_seconds(model: Model, generator: Generator, request: Request) -> float:
    return timed(
        lambda: generator.generate(model.processor.collate(request.prompts), request.new_tokens)
    )


def compare(model: Model, generator: Generator, requests: list[Request]) -> dict[str, Any]:
    """Time each request in both ways, one after the other."""
    rows = []
    for request in progress(requests, "exact shapes"):
        exact = exact_seconds(model, request)
        ours = padded_seconds(model, generator, request)
        rows.append({"prompts": len(request.prompts), "exact": exact, "padded": ours})
    exact, ours = (statistics.mean(r[k] for r in rows) for k in ("exact", "padded"))
    return {"requests": rows, "exact_mean": exact, "padded_mean": ours, "ratio": ours / exact}


def soak(model: Model, generator: Generator, rng: np.random.Generator, count: int) -> list[dict]:
    """Run the long load; return one row per request."""
    rows = []
    for _ in progress(range(count), "request"):
        request = random_request(model, rng)
        compiled, began = generator.programs.compiled, time.perf_counter()
        generator.generate(model.processor.collate(request.prompts), request.new_tokens)
        rows.append(usage(generator, began, compiled))
    return rows


def usage(generator: Generator, began: float, compiled: int) -> dict[str, Any]:
    """What a request took since ``began``, and what the process holds now.

    Args:
        compiled: programs that had been compiled by then.
    """
    return {
        "seconds": time.perf_counter() - began,
        "compiled": generator.programs.compiled - compiled,
        "resident_bytes": resident_bytes(),
        "memory_maps": memory_maps(),
        "programs": len(generator.programs),
    }


def summary(rows: list[dict]) -> dict[str, Any]:
    """Summarise a long run: totals, and memory in its middle tenth and its last tenth."""
    tenth = max(1, len(rows) // 10)
    middle, last = rows[len(rows) // 2 :][:tenth], rows[-tenth:]
    warm = [r["seconds"] for r in rows if not r["compiled"]]
    out: dict[str, Any] = {
        "requests": len(rows),
        "programs_most": max(r["programs"] for r in rows),
        "compiled": sum(r["compiled"] for r in rows),
        "compiled_in_last_tenth": sum(r["compiled"] for r in last),
        "warm_seconds_mean": statistics.mean(warm) if warm else None,
    }
    for name in ("resident_bytes", "memory_maps"):
        half, end = (statistics.mean(r[name] for r in part) for part in (middle, last))
        out[name] = {"half_way": half, "end": end, "ratio": end / half}
    return out


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot memory, maps and programs over the requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    curves = {
        "resident memory (MB)": [r["resident_bytes"] / 1e6 for r in rows],
        "memory maps of the process": [r["memory_maps"] for r in rows],
        "compiled programs alive": [r["programs"] for r in rows],
    }
    figure, axes = pyplot.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    figure.suptitle(
        f"{len(rows)} mixed requests, {result['model']} shapes, W4A8, {result['machine']['device']}"
    )
    for ax, (name, values) in zip(axes, curves.items(), strict=True):
        ax.plot(range(1, len(values) + 1), values)
        ax.set_ylabel(name)
        ax.set_ylim(0, 1.15 * max(values))
        ax.grid(alpha=0.3)
    axes[2].axhline(result["limit"], color="black", linestyle="--", linewidth=1)
    axes[2].annotate("limit", (1, result["limit"]), xytext=(0, 3), textcoords="offset points")
    axes[2].set_ylim(0, 1.2 * result["limit"])
    axes[2].set_xlabel("requests answered")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(result: dict[str, Any]) -> str:
    lines = []
    if result["comparison"]:
        c = result["comparison"]
        lines.append(
            f"mean of {len(c['requests'])} warm requests: exact shapes {c['exact_mean']:.2f} s, "
            f"as generate runs them {c['padded_mean']:.2f} s, ratio {c['ratio']:.2f}"
        )
    return "\n".join(lines + summary_lines(result))


def summary_lines(result: dict[str, Any]) -> list[str]:
    """What a person reads of the long run, if there was one."""
    s = result["summary"]
    if not s:
        return []
    lines = [
        f"{s['requests']} requests, {s['compiled']} programs compiled "
        f"({s['compiled_in_last_tenth']} in the last tenth), at most {s['programs_most']} alive"
    ]
    for name, unit, label in (("resident_bytes", 1e6, "MB"), ("memory_maps", 1, "maps")):
        m = s[name]
        lines.append(
            f"{m['half_way'] / unit:.0f} {label} half way, {m['end'] / unit:.0f} at the end"
        )
    return lines


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.soak", __doc__ or "")
    add = parser.add_argument
    add("--model", choices=MODELS, default="demo", help="layer shapes (default demo)")
    add("--layers", type=int, default=4, metavar="N", help="layers of each tower (4; not demo)")
    add(
        "--requests",
        type=int,
        default=1000,
        metavar="N",
        help="length of the long run; 0: none (1000)",
    )
    add("--exact", type=int, default=0, metavar="N", help="requests timed both ways (default 0)")
    add("--seed", type=int, default=0, help="random seed of the requests")
    add("--plot", type=Path, metavar="FILE", help="draw memory and programs (PNG)")
    add_output_options(parser)
    args = parser.parse_args(argv)
    for name in ("requests", "exact"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} must be 0 or more")
    if args.plot and not args.requests:
        raise UserError("--plot draws the long run; set --requests to 1 or more")
    model = random_weights(args.model, args.layers)
    generator = Generator(model.module, NEVER_STOP, programs=Programs())
    rng = np.random.default_rng(args.seed)
    requests = [random_request(model, rng) for _ in range(args.exact)]
    comparison = compare(model, generator, requests) if requests else None
    rows = soak(model, generator, rng, args.requests)
    result = {
        "machine": machine(), "model": args.model, "layers": args.layers, "seed": args.seed,
        "limit": generator.programs.limit, "comparison": comparison,
        "summary": summary(rows) if rows else None, "rows": rows,
    }  # fmt: skip
    if args.plot:
        plot(result, args.plot)
    deliver(result, args, table)
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
