"""What a checkpoint holds, which kernel each layer runs, and on which devices it fits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mquant_jax.checkpoint.manifest import REPORT, load_manifest
from mquant_jax.cli_support import OK, Parser, add_no_verify
from mquant_jax.errors import UserError
from mquant_jax.loading import describe, load_model
from mquant_jax.nn.params import dense_layers
from mquant_jax.numerics import QWeight
from mquant_jax.ops.dense import platform, select_path
from mquant_jax.recipe import Recipe
from mquant_jax.runtime.memory import DEVICES, device, memory
from mquant_jax.sections import kind_of
from mquant_jax.validate import count


def layer_paths(model, recipe: Recipe) -> list[dict]:
    """One row per kind of dense layer: bits, activation mode and the form that runs."""
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
                "one_row": select_path(int8, 1, value),
                "many_rows": select_path(int8, 1024, value),
            }
        key = (kind, row["weights"])
        rows.setdefault(key, row)["count"] += 1
    return list(rows.values())


def worst_points(report: dict, count: int) -> str:
    """The quantisation points (and token classes) that lose most, and what else was decided."""
    rows = [
        (seen["error"], point, cls, seen)
        for point, classes in report["points"].items()
        for cls, seen in classes.items()
    ]
    lines = [f"{'point':<40} {'class':<7} {'error':>8} {'largest':>10} {'clip':>10} {'clipped':>9}"]
    for error, point, cls, seen in sorted(rows, key=lambda row: -row[0])[:count]:
        lines.append(f"{point:<40} {cls:<7} {error:>8.2%} {seen['amax']:>10.3g} "
                     f"{seen['clip']:>10.3g} {seen['clipped']:>9.4%}")  # fmt: skip
    if "sinks" in report:
        lines.append("sinks: positions {positions}, token ids {ids}".format(**report["sinks"]))
    for name, split in report.get("split", {}).items():
        done = "split off" if split["split"] else "kept"
        lines.append(f"{name}: channel {split['channel']} leads {split['rows_led']:.0%} of the "
                     f"rows, {done}")  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the plan, the sizes and the path that each layer executes on this platform."""
    parser = Parser("python -m mquant_jax inspect", __doc__)
    parser.add_argument("checkpoint", help="folder written by convert.hf_to_flax")
    parser.add_argument("--points", type=int, default=0, metavar="N", help="show the N "
                        "quantisation points with the largest rounding and clipping error on the "
                        "calibration data")  # fmt: skip
    add = parser.add_argument
    add("--memory", action="store_true", help="say whether it fits a device; no weight is read")
    add("--device", action="append", metavar="NAME", help="with --memory, may be repeated: "
        f"{', '.join(DEVICES)} (default: all)")  # fmt: skip
    add("--context", type=int, metavar="N", help="with --memory: tokens of a sequence (default: "
        "the model's longest)")  # fmt: skip
    add("--batch", type=int, metavar="B", help="with --memory: sequences at once (default 1)")
    add("--kv-cache", choices=("float", "int8"), help="with --memory (default float)")
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    points = count(args.points, "--points", least=0)
    if args.memory:
        return _memory(args)
    for name in ("device", "context", "batch", "kv_cache"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} goes with --memory")
    loaded = load_model(Path(args.checkpoint), verify=args.verify)
    recipe = Recipe.from_json(loaded.manifest["recipe"], "mquant.json: recipe")
    rows = layer_paths(loaded.model, recipe)
    if args.json:
        print(json.dumps({"platform": platform(), "recipe": recipe.to_json(), "layers": rows}))
        return OK
    print(f"family {loaded.manifest['family']}, recipe {recipe.name}, platform {platform()}\n")
    print(recipe.table() + "\n")
    print(f"{'layer':<32} {'count':>5}  {'weights':<8} {'activations':<13} one row / many rows")
    for r in rows:
        forms = f"{r['one_row']} / {r['many_rows']}" if "one_row" in r else "float dot"
        print(f"{r['layer']:<32} {r['count']:>5}  {r['weights']:<8} {r['activations']:<13} {forms}")
    if points:
        print("\n" + _points(Path(args.checkpoint), points))
    return OK


def _memory(args: argparse.Namespace) -> int:
    """Weights, cache and activations on each device; nothing but JSON is read."""
    folder = Path(args.checkpoint)
    family, config, recipe, _ = describe(folder, load_manifest(folder, args.verify))
    longest = config.language.max_positions
    given = longest if args.context is None else args.context
    context = count(given, "--context", most=longest)
    batch = count(1 if args.batch is None else args.batch, "--batch", most=1 << 20)
    chosen = {name: device(name) for name in args.device or DEVICES}
    found = {
        name: memory(family, config, recipe, where, context, batch, args.kv_cache == "int8")
        for name, where in chosen.items()
    }
    if args.json:
        devices = {name: fit.to_json() for name, fit in found.items()}
        print(json.dumps({"context": context, "batch": batch, "devices": devices}))
    else:
        print(f"context {context}, batch {batch}, {args.kv_cache or 'float'} cache")
        print("\n".join(fit.text(name) for name, fit in found.items()))
    return OK


def _points(folder: Path, count: int) -> str:
    path = folder / REPORT
    if not path.is_file():
        raise UserError(f"{path}: no such file; only quantised checkpoints have a report")
    return worst_points(json.loads(path.read_text(encoding="utf-8")), count)
