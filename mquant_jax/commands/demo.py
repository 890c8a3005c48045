"""Compare the bundled model in float and W4A8."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from mquant_jax.api import Model, load
from mquant_jax.checkpoint.manifest import load_manifest
from mquant_jax.cli_support import OK, Parser, progress
from mquant_jax.eval.exact_match import ExactMatch, evaluate
from mquant_jax.eval.speed import measure, summary
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.convert import convert
from mquant_jax.report.contact_sheet import Card, contact_sheet
from mquant_jax.runtime.options import Options
from mquant_jax.samples import BUNDLED_HELDOUT, DEMO_ASSETS, Sample, read_samples

EPILOG = """\
The bundled model is a small Qwen2-VL, trained from scratch (examples/train_demo.py) to read words
and to name, count and locate shapes. The first run converts it, which takes a minute or two. Later
runs reuse OUT/float and OUT/w4a8.
"""
SHOWN = 12


def converted(out: Path, recipe: str) -> Path:
    """The bundled model converted with ``recipe``, reused from an earlier run if possible."""
    source, folder = DEMO_ASSETS / "model", out / recipe
    stamp = {"size": (source / "model.safetensors").stat().st_size}
    marker = folder / "demo_source.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == stamp:
        load_manifest(folder)
        return folder
    convert(source, folder, PRESETS[recipe], overwrite=True, restart=True)
    marker.write_text(json.dumps(stamp), encoding="utf-8")
    return folder


def cards(samples: list[Sample], results: dict[str, ExactMatch], count: int) -> list[Card]:
    """``count`` samples, spread evenly over the tasks."""
    by_task: dict[str, list[int]] = {}
    for i, s in enumerate(samples):
        by_task.setdefault(s.task, []).append(i)
    turns = [i for group in zip(*by_task.values(), strict=False) for i in group][:count]
    return [
        Card(
            np.asarray(samples[i].images[0]),
            samples[i].question,
            samples[i].answer,
            {name: r.answers[i] for name, r in results.items()},
        )
        for i in turns
    ]


def speeds(models: dict[str, Model], sample: Sample, rows: int) -> tuple[list[dict], dict]:
    """Time prefill and decode of ``rows`` copies of one prompt, alternating between variants."""
    first = next(iter(models.values()))
    prompt = sample.prompt(first.processor)
    batch = first.collate([prompt] * rows)
    timings = measure({n: (m.module, batch) for n, m in models.items()}, 16, 5)
    return summary(timings, rows, len(prompt.input_ids), 16, "w4a8")


def report_text(out: dict, table: list[dict], results: dict[str, ExactMatch]) -> str:
    """The comparison as text."""
    mb = 1e6
    quantised = results["w4a8"].by_task()
    lines = [
        "",
        f"{'':<22}{'float':>10}{'w4a8':>10}",
        f"{'weights on disk (MB)':<22}{out['float_bytes'] / mb:>10.2f}"
        f"{out['w4a8_bytes'] / mb:>10.2f}",
        f"{'exact match (%)':<22}{100 * out['float_exact_match']:>10.1f}"
        f"{100 * out['w4a8_exact_match']:>10.1f}   of {out['n']} held-out questions",
    ]
    for task, score in results["float"].by_task().items():
        lines.append(f"{'  ' + task:<22}{100 * score:>10.1f}{100 * quantised[task]:>10.1f}")
    rows = {r["variant"]: r for r in table}
    for label, key in (("prefill (tokens/s)", "prefill_tokens_per_second"),
                       ("decode (tokens/s)", "decode_tokens_per_second")):  # fmt: skip
        lines.append(f"{label:<22}{rows['float'][key]:>10.0f}{rows['w4a8'][key]:>10.0f}")
    lines += ["", f"pictures, questions and answers: {out['contact_sheet']}"]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Convert, answer the questions, and print and draw the comparison."""
    parser = Parser("python -m mquant_jax demo", __doc__, EPILOG)
    add = parser.add_argument
    add("--out", type=Path, default=Path("mquant-demo"), help="folder (default ./mquant-demo)")
    add("--limit", type=int, metavar="N", help="use the first N held-out questions (default all)")
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    limit = Options(limit=args.limit).limit
    say = (lambda text: None) if args.json else print
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    say("converting the bundled model (float and w4a8) ...")
    models, sizes = {}, {}
    for name in ("float", "w4a8"):
        folder = converted(args.out, name)
        models[name] = load(folder)
        sizes[name] = models[name].manifest["total_bytes"]
    samples = read_samples(BUNDLED_HELDOUT, limit)
    results = {}
    for name, model in models.items():
        say(f"answering {len(samples)} held-out questions with {name} ...")
        results[name] = evaluate(model, samples, progress=progress)
    shown = cards(samples, results, SHOWN)
    say("")
    for card in shown[:6]:
        said = "  ".join(f"{name}: {answer!r}" for name, answer in card.answers.items())
        say(f"{card.question:<36} {said}")
    say("\nmeasuring speed ...")
    table, ratios = speeds(models, samples[0], 16)
    sheet = args.out / "contact_sheet.png"
    contact_sheet(shown, sheet, "mquant_jax demo: float and W4A8 answers")
    out = {
        "float_exact_match": results["float"].score,
        "w4a8_exact_match": results["w4a8"].score,
        "n": len(samples),
        "float_bytes": sizes["float"],
        "w4a8_bytes": sizes["w4a8"],
        "by_task": {name: r.by_task() for name, r in results.items()},
        "speed": table,
        "ratios": ratios,
        "contact_sheet": str(sheet),
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(out) if args.json else report_text(out, table, results))
    return OK
