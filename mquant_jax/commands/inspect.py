"""Show the contents of a checkpoint and the kernel that each layer runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mquant_jax.checkpoint.manifest import REPORT
from mquant_jax.cli_support import OK, Parser, add_no_verify
from mquant_jax.errors import UserError
from mquant_jax.loading import outline
from mquant_jax.nn.params import dense_layers
from mquant_jax.numerics import QWeight
from mquant_jax.ops.dense import DENSE, Product
from mquant_jax.recipe import Recipe
from mquant_jax.report.findings import collect, read_record
from mquant_jax.report.summary import summary, text
from mquant_jax.runtime import choices
from mquant_jax.runtime.buckets import MOST_TOGETHER_ELSEWHERE
from mquant_jax.runtime.generate import KV_CACHES
from mquant_jax.runtime.memory import ACCELERATORS, checkpoint_plan
from mquant_jax.sections import kind_of
from mquant_jax.target import target
from mquant_jax.validate import count


def layer_paths(model, recipe: Recipe) -> list[dict]:
    """One row per kind of dense layer: bits, activation mode and kernel."""
    rows: dict[tuple, dict] = {}
    for path, value in dense_layers(model).items():
        kind, section = kind_of(path), recipe.section_for(path)
        row = {"layer": kind, "count": 0, "weights": "float", "activations": "float"}
        if isinstance(value, QWeight):
            int8 = section.activations != "none"
            row |= {
                "weights": f"int{value.bits}",
                "group_size": section.group_size,
                "activations": f"int8 {section.activations}" if int8 else "float",
                "one_row": _form(1, value, int8),
                "many_rows": _form(1024, value, int8),
            }
        key = (kind, row["weights"], row["activations"], row.get("group_size"))
        rows.setdefault(key, row)["count"] += 1
    return list(rows.values())


def _form(rows: int, w: QWeight, int8: bool) -> str:
    return DENSE.choose(Product.of(rows, w, "int8" if int8 else "float")).name


def worst_points(report: dict, count: int) -> str:
    """The quantisation points (and token classes) with the largest error."""
    rows = [
        (seen["error"], point, cls, seen)
        for point, classes in report["points"].items()
        for cls, seen in classes.items()
    ]
    lines = [f"{'point':<40} {'class':<7} {'error':>8} {'largest':>10} {'clip':>10} {'clipped':>9}"]
    for error, point, cls, seen in sorted(rows, key=lambda row: -row[0])[:count]:
        lines.append(f"{point:<40} {cls:<7} {error:>8.2%} {seen['amax']:>10.3g} "
                     f"{seen['clip']:>10.3g} {seen['clipped']:>9.4%}")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the plan, the sizes and each layer's kernel on this platform."""
    parser = Parser("python -m mquant_jax inspect", __doc__)
    parser.add_argument("checkpoint", help="folder written by convert")
    parser.add_argument("--points", type=int, default=0, metavar="N", help="show the N "
                        "quantisation points with the largest rounding and clipping error on the "
                        "calibration data")  # fmt: skip
    add = parser.add_argument
    add("--memory", action="store_true", help="show whether the checkpoint fits on accelerators")
    add("--context", type=int, metavar="N", help="with --memory: tokens per row, prompt and answer "
        "(default 4096, or the model's limit)")  # fmt: skip
    add("--batch", type=int, default=1, metavar="B", help="with --memory: rows (default 1)")
    add("--patches", type=int, default=MOST_TOGETHER_ELSEWHERE, metavar="P", help="with --memory: "
        "patches of the largest picture; up to the default %(default)s run together")  # fmt: skip
    add("--device", choices=ACCELERATORS, help="with --memory: one device (default all)")
    add("--kv-cache", choices=KV_CACHES, default="float", help="with --memory (default float)")
    add_no_verify(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    points = count(args.points, "--points", least=0)
    if args.memory:
        return _memory(args)
    given = args.context is not None or args.device is not None
    if given or args.batch != 1 or args.patches != MOST_TOGETHER_ELSEWHERE:
        raise UserError("--context, --batch, --patches and --device need --memory")
    loaded = outline(args.checkpoint, args.verify)
    findings = collect(args.checkpoint, verify=False)  # already verified
    recipe = Recipe.from_json(loaded.manifest["recipe"], "mquant.json: recipe")
    rows = layer_paths(loaded.model, recipe)
    tokens, ran = choices.example_rows(loaded)
    if args.json:
        print(json.dumps({"platform": target().platform, "recipe": recipe.to_json(),
                          "layers": rows, "forms": ran, "report": summary(findings)}))  # fmt: skip
        return OK
    print(f"family {loaded.manifest['family']}, recipe {recipe.name}, "
          f"platform {target().platform}\n")  # fmt: skip
    print(recipe.table() + "\n")
    print(f"{'layer':<32} {'count':>5}  {'weights':<8} {'activations':<13} one row / many rows")
    for r in rows:
        forms = f"{r['one_row']} / {r['many_rows']}" if "one_row" in r else "float dot"
        print(f"{r['layer']:<32} {r['count']:>5}  {r['weights']:<8} {r['activations']:<13} {forms}")
    print(f"\none prompt of {tokens} tokens:\n" + choices.table(ran))
    if recipe.changes_weights:
        print("\n" + text(findings))
    if points:
        print("\n" + _points(Path(args.checkpoint), points))
    return OK


def _memory(args: argparse.Namespace) -> int:
    count(args.batch, "--batch")
    count(args.patches, "--patches")
    devices = [args.device] if args.device else list(ACCELERATORS)
    options = {
        "context": args.context, "batch": args.batch, "int8_cache": args.kv_cache == "int8",
        "patches": args.patches,
    }  # fmt: skip
    plans = [checkpoint_plan(Path(args.checkpoint), device, **options) for device in devices]
    if args.json:
        print(json.dumps({"memory": [plan.to_json() for plan in plans]}))
        return OK
    first = plans[0]
    print(f"{first.batch} row(s) of {first.context} tokens, {args.kv_cache} cache, "
          f"{first.patches} patches at once; GB")  # fmt: skip
    print(f"{'device':<9} {'weights':>8} {'cache':>8} {'working':>8} {'total':>8} {'capacity':>8}"
          "  fits  longest context")  # fmt: skip
    for p in plans:
        sizes = (p.weights, p.cache, p.working, p.total, p.capacity)
        cells = " ".join(f"{n / 1e9:>8.2f}" for n in sizes)
        print(f"{p.device:<9} {cells}  {'yes' if p.fits else 'no':<4}  {p.longest_context}")
    return OK


def _points(folder: Path, count: int) -> str:
    record = read_record(folder)
    if record is None:
        raise UserError(
            f"{folder / REPORT}: no such file; only quantised checkpoints have a report"
        )
    return worst_points(record, count)
