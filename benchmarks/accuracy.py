"""Measure the accuracy of every method against the float model, on one of four test beds.

    python -m benchmarks.accuracy --bed demo|outlier|smollm2|llava [--ablation] [--quick] [--json]

``demo``     the bundled model on its held-out questions: exact match, KL
``outlier``  the same model with channels made 10 to 100 times larger than the rest without a change
             of function (benchmarks/outliers.py), as in large models; several random draws
``smollm2``  SmolLM2-135M-Instruct on real text: perplexity, KL (benchmarks/smollm2.py says what
             to install)
``llava``    a LLaVA of pretrained parts, DINOv2-small and SmolLM2, on held-out pictures: exact
             match, its paired difference to float, KL, token agreement (benchmarks/llava_bed.py)

Calibration and evaluation data never overlap. Intervals are 95 % bootstrap intervals over
questions. KL is the mean over tokens of the divergence from the float model, in nats. Dynamic rows
share the weights of the static rows and compute one activation scale per token at run time. All
methods quantise every dense layer to W4A8 (the head to W8A8; in smollm2 and llava it stays float).
``--ablation`` adds the method's parts one at a time instead.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks import llava_rows as llava
from benchmarks.output import add_output_options, deliver, save
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.commands.allocate import table as allocated
from mquant_jax.errors import UserError
from mquant_jax.models.base import abstract_model
from mquant_jax.nn.params import set_params
from mquant_jax.presets import METHODS
from mquant_jax.ptq.budget import choose, mean_bits
from mquant_jax.ptq.pipeline import quantize_params, untied
from mquant_jax.recipe import Recipe, Section, Split, Tuning

GROUP = 64


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: method, group size of the language model, activation mode; with a
    budget, bits for each layer chosen within it (``mquant_jax allocate``)."""

    method: str
    recipe: Recipe
    group_size: int | None = None
    activations: str = "static"
    budget: float | None = None

    def plan(self, float_head: bool) -> Recipe:
        """Return the recipe with group size and activation mode applied."""
        sections = {}
        for name in ("vision", "connector", "language", "head"):
            section = self.recipe.section(name)
            if name == "language":
                section = replace(section, group_size=self.group_size)
            sections[name] = replace(section, activations=self.activations)
        if float_head:
            sections |= {"head": Section(), "embedding": Section()}
        return replace(self.recipe, **sections)


def method_rows(group_sizes: tuple[int | None, ...]) -> list[Row]:
    """Return a static and a dynamic row for every method."""
    return [
        Row(name, recipe, group, activations)
        for group in group_sizes
        for name, recipe in METHODS.items()
        for activations in ("static", "dynamic")
    ]


def ablation_rows() -> list[Row]:
    """Return rows from rounding to nearest to the whole method, adding one part at a time."""
    full = METHODS["mquant"]
    recipe, rows = METHODS["rtn"], [Row("rtn", METHODS["rtn"])]
    plain = replace(full.weights, asymmetry=0.0, refit=0, visual_weight=1.0)
    steps: dict[str, dict[str, Any]] = {
        "+rotation": {"rotate": True},
        "+gptq": {"weights": plain},
        "+msq": {"modality_scales": True},
        "+sink": {"sink_class": True},
        "+rms": {"split": Split("measured")},
        "+headroom": {"weights": full.weights, "calibration": full.calibration},
        "+learned scales": {"tune": full.tune},
        "+balance": {"balance": True},
    }
    for name, changes in steps.items():
        recipe = replace(recipe, **changes)
        rows.append(Row(name, recipe))
    rows.append(Row("mquant", full))  # without the split
    rows.append(Row("mquant, no learning", replace(full, tune=Tuning())))
    by_block = replace(full.tune, form="block")
    rows.append(Row("mquant, by block", replace(full, tune=by_block)))
    paper = replace(recipe, online_signs=False, tune=Tuning())
    rows.append(Row("plain Hadamard", replace(paper, split=Split())))
    rows.append(Row("plain Hadamard +rms", replace(paper, split=Split("paper"))))
    return rows


def budget_rows(budgets: list[float]) -> list[Row]:
    """Return static rows of ``mquant``: 4 bits in groups everywhere, then one for each budget."""
    recipe = METHODS["mquant"]
    chosen = [Row(f"mquant, {bits:g} bits", recipe, budget=bits) for bits in budgets]
    return [Row("mquant", recipe, GROUP), *chosen]


def quantised_params(
    bed: Any, recipe: Recipe, budget: float | None = None
) -> tuple[Recipe, Any, dict[str, Any]]:
    """Quantise the bed's model; return the recipe, with the rules that the budget gives, the
    model's config and its tensors."""
    params, config = dict(bed.params), bed.config
    if recipe.rotate:
        config, params = untied(config, params)
    batch = bed.calibration if recipe.needs_calibration else None
    if budget is not None:
        found = choose(bed.family, config, recipe, budget, params, bed.calibration)
        recipe = found.recipe
        print(allocated(found), file=sys.stderr)
    return recipe, config, quantize_params(bed.family, config, recipe, params, batch)[0]


def built(bed: Any, config: Any, recipe: Recipe, params: dict[str, Any]) -> nnx.Module:
    """Build the model of ``recipe``; tensors that it does not use, such as static scales, are
    ignored."""
    module = abstract_model(bed.family, config, recipe)
    set_params(module, dict(params))
    return module


def measured(bed: Any, rows: list[Row], float_head: bool) -> Iterator[dict[str, Any]]:
    """Yield one JSON row after another; a dynamic row reuses the weights of the static row before
    it."""
    last: tuple[Any, ...] = (None,)
    for row in progress(rows, "methods"):
        recipe, same = row.plan(float_head), (row.method, row.group_size)
        began = time.monotonic()
        if row.activations == "static" or last[0] != same:
            last = same, *quantised_params(bed, recipe, row.budget)
        seconds = time.monotonic() - began
        module = built(bed, last[2], replace(recipe, rules=last[1].rules), last[3])
        head = {k: getattr(row, k) for k in ("method", "group_size", "activations")}
        head["bits"] = mean_bits(bed.family, last[2], last[1])
        yield head | bed.evaluate(module) | {"quantise_seconds": round(seconds, 1)}
        del module
        gc.collect()


def run_demo(draws: list[int | None], questions: int, rows: list[Row]) -> dict[str, Any]:
    """Run the demo bed (``draws = [None]``) or the outlier bed, averaged over its draws."""
    from benchmarks.demo_bed import DemoBed

    tables = []
    for draw in draws:
        bed = DemoBed(questions, draw)
        tables.append(list(measured(bed, rows, float_head=False)))
    merged = []
    for same in zip(*tables, strict=True):
        row = dict(same[0])
        for key in ("exact_match", "kl", "logit_error", "ci95"):
            row[key] = np.mean([r[key] for r in same], axis=0).tolist()
        if len(draws) > 1:
            row["exact_match_by_draw"] = [r["exact_match"] for r in same]
        merged.append(row)
    return {
        "float_exact_match": bed.float_result["exact_match"],
        "float_ci95": bed.float_result["ci95"],
        "n": bed.n,
        "draws": draws,
        "rows": merged,
    }


def run_text(windows: int, rows: list[Row], file: Path | None) -> dict[str, Any]:
    """Run the smollm2 bed and save the result after every row, because a full run is long."""
    from benchmarks.smollm2 import TextBed, perplexity

    bed = TextBed(windows)
    floats = perplexity(bed.float, bed.windows)
    result = {"bed": "smollm2", "float_ppl": floats, "windows": windows, "rows": []}
    for row in measured(bed, rows, float_head=True):
        result["rows"].append(row | {"ratio": row["ppl"] / floats})
        save(result, file)
    return result


def run_llava(rows: list[llava.Row], questions: int | None, args: Any) -> dict[str, Any]:
    """Run the llava bed and save the result after every row; with ``--resume``, rows that the file
    holds of the same model, questions and seed are kept."""
    from benchmarks.llava_bed import LlavaBed

    bed = LlavaBed(questions, args.folder)
    head = {"bed": "llava", "n": bed.n, "seed": args.seed, "kl_after": "own answers"}
    head |= {"fingerprint": bed.fingerprint}
    result: dict[str, Any] = head | bed.float_result | {"questions": bed.questions}
    result["rows"] = llava.kept(args.save, head) if args.resume else []
    compared = llava.steps(rows) if args.ablation else [*llava.pairs(), *llava.budget_pairs(rows)]
    result["gains"] = llava.gains(result, compared)
    last: tuple[Any, ...] = (None,)
    for row in progress(llava.missing(rows, result["rows"]), "rows"):
        began, rounded = time.monotonic(), row.rounded_as()
        if last[0] != rounded:
            last = (None,)  # frees its tensors
            plan = replace(rounded.plan(), seed=args.seed)
            last = rounded, *quantised_params(bed, plan, row.budget)
        seconds = time.monotonic() - began
        recipe = replace(row.plan(), seed=args.seed, rules=last[1].rules)
        module = built(bed, last[2], recipe, last[3])
        found = bed.evaluate(module) | {"quantise_seconds": round(seconds, 1)}
        result["rows"].append(row.key() | found)
        result["gains"] = llava.gains(result, compared)
        save(result, args.save)
        del module
        gc.collect()
    return result


def delta_table(result: dict[str, Any]) -> str:
    """Format the rows of the llava bed as text."""
    lines = [
        f"float {result['float_exact_match']:.1%} of {result['n']}",
        f"{'method':<16} {'scope':<8} {'group':>5} {'weights':<8} {'activations':<13} "
        f"{'exact match':>11} {'points':>7} {'95 % interval':>15} {'KL':>8} {'tokens':>7} {'s':>5}",
    ]
    for r in result["rows"]:
        low, high = r["delta_ci95"]
        lines.append(
            f"{r['method']:<16} {r['scope']:<8} {r['group_size'] or '-':>5} {r['weights']:<8} "
            f"{r['activations']:<13} {r['exact_match']:>11.1%} {100 * r['delta']:>+7.1f} "
            f"{100 * low:>+7.1f} {100 * high:>+7.1f} {r['kl']:>8.4f} "
            f"{r['token_agreement']:>7.1%} {r['quantise_seconds']:>5.0f}"
        )
    for g in result["gains"]:
        low, high = (100 * x for x in g["delta_ci95"])
        lines.append(
            f"{g['row']} over {g['over']}: {100 * g['delta']:+.1f} points ({low:+.1f} to "
            f"{high:+.1f}), KL {g['kl_over']:.4f} -> {g['kl']:.4f}"
        )
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """Format the rows as text."""
    if "delta_ci95" in (result["rows"] or [{}])[0]:
        return delta_table(result)
    text = "float_ppl" in result
    if text:
        lines = [f"float perplexity {result['float_ppl']:.3f}"]
        titles = f"{'perplexity':>12} {'ratio':>8}"
    else:
        low, high = result["float_ci95"]
        score = result["float_exact_match"]
        lines = [f"float {score:.1%} ({low:.1%} to {high:.1%}) of {result['n']}"]
        titles = f"{'exact match':>12} {'95 % interval':>16}"
    lines.append(
        f"{'method':<20} {'group':>5} {'activations':<11} {'bits':>5} {titles} {'KL':>9} {'s':>6}"
    )
    for r in result["rows"]:
        if text:
            middle = f"{r['ppl']:>12.3f} {r['ratio']:>8.4f}"
        else:
            low, high = r["ci95"]
            middle = f"{r['exact_match']:>12.1%} {low:>8.1%} {high:>7.1%}"
        lines.append(
            f"{r['method']:<20} {r['group_size'] or '-':>5} {r['activations']:<11} "
            f"{r['bits']:>5.2f} {middle} "
            f"{r['kl']:>9.4f} {r['quantise_seconds']:>6.0f}"
        )
    return "\n".join(lines)


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.accuracy", __doc__ or "")
    add = parser.add_argument
    add("--bed", choices=("demo", "outlier", "smollm2", "llava"), default="demo",
        help="default demo")  # fmt: skip
    add("--draws", type=int, default=4, metavar="N", help="random draws of the outlier bed "
        "(default 4)")  # fmt: skip
    add("--ablation", action="store_true", help="add the method's parts one by one")
    add("--budget", type=float, action="append", metavar="BITS", help="only mquant in groups of "
        "64, and with bits chosen for each layer, so many in the mean; repeatable")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the rotations (default 0)")
    add("--method", action="append", metavar="NAME", help="only this method's rows; repeatable")
    add("--quick", action="store_true", help="about a minute: 100 questions, one draw, per-channel "
        "weights; smollm2: 8 windows, static rows of two methods; llava (five minutes): 500 "
        "questions, two rows")  # fmt: skip
    add("--folder", type=Path, metavar="DIR", help="llava: the folder that benchmarks.llava_folder "
        "wrote; by default it is written anew")  # fmt: skip
    add("--resume", action="store_true", help="llava: keep the rows that --save FILE holds")
    add_output_options(parser)
    args = parser.parse_args(argv)
    if args.resume and not args.save:
        raise UserError("--resume continues a file: name it with --save FILE")
    result = {"bed": args.bed, "seed": args.seed} | _result(args)
    deliver(result, args, table)
    return OK


def _result(args: Any) -> dict[str, Any]:
    """Run the bed that the options name."""
    if args.bed == "llava":
        rows = _named(_llava_rows(args), args.method)
        return run_llava(rows, 500 if args.quick else None, args)
    text = args.bed == "smollm2"
    groups = (None,) if args.quick or not text else (None, GROUP)
    rows = ablation_rows() if args.ablation else method_rows(groups)
    if text and args.quick:
        rows = [r for r in rows if r.method in ("rtn", "mquant") and r.activations == "static"]
    rows = budget_rows(args.budget) if args.budget else rows
    rows = [replace(r, recipe=replace(r.recipe, seed=args.seed)) for r in _named(rows, args.method)]
    if text:
        return run_text(8 if args.quick else 24, rows, args.save)
    draws = list(range(1 if args.quick else args.draws)) if args.bed == "outlier" else [None]
    return run_demo(draws, 100 if args.quick else 500, rows)


def _named(rows: list[Any], methods: list[str] | None) -> list[Any]:
    """The rows of these methods; ``None``: all.

    Raises:
        UserError: a method has no row.
    """
    known = dict.fromkeys(r.method for r in rows)
    for name in methods or ():
        if name not in known:
            raise UserError(f"--method {name}: no row is named so; known: {', '.join(known)}")
    return [r for r in rows if not methods or r.method in methods]


def _llava_rows(args: Any) -> list[llava.Row]:
    if args.ablation or args.budget:
        rows = ablation_rows() if args.ablation else budget_rows(args.budget)
        return [
            llava.Row(
                r.method, _scales(r.recipe), group_size=r.group_size, recipe=r.recipe,
                budget=r.budget,
            )
            for r in rows
        ]  # fmt: skip
    return llava.quick_rows() if args.quick else llava.rows()


def _scales(recipe: Recipe) -> str:
    if not recipe.modality_scales:
        return llava.SHARED
    return llava.SINK if recipe.sink_class else llava.MODALITY


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
