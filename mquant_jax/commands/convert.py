"""Convert a Hugging Face model folder to a checkpoint folder, quantised by a recipe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mquant_jax.cli_support import OK, WARNINGS, Parser, peak_bytes, strict
from mquant_jax.commands.dry_run import dry_run, show
from mquant_jax.compile_cache import keep_compiled_programs
from mquant_jax.errors import UserError
from mquant_jax.presets import METHODS, PRESETS, resolve_recipe
from mquant_jax.ptq.convert import convert
from mquant_jax.recipe import SECTIONS
from mquant_jax.runtime.memory import ACCELERATORS
from mquant_jax.stages import listening
from mquant_jax.validate import choice

AUTO = "auto"  # of --recipe: the bits are chosen


def presets_table() -> str:
    """One line per preset: bits and activation mode of every section."""
    rows = [f"  {'preset':<14}" + "".join(f"{s:<16}" for s in SECTIONS)]
    for name, recipe in PRESETS.items():
        cells = []
        for part in map(recipe.section, SECTIONS):
            bits = f"int{part.w_bits}" if part.quantised else "float"
            act = "" if part.activations == "none" else f" {part.activations}"
            cells.append(f"{bits + act:<16}")
        rows.append((f"  {name:<14}" + "".join(cells)).rstrip())
    return "\n".join(rows)


def _parser() -> Parser:
    epilog = f"""recipes (weights and activations of each part; a JSON file has more settings):
{presets_table()}
  methods for comparison, all W4A8 static: {", ".join(METHODS)}

examples:
  python -m mquant_jax convert Qwen2-VL-2B-Instruct out/float
  python -m mquant_jax convert Qwen2-VL-2B-Instruct out/w4a8 --recipe w4a8 --calibration my.jsonl
  python -m mquant_jax convert Qwen2-VL-2B-Instruct out/mixed --recipe auto --budget 4.5
  python -m mquant_jax convert Qwen/Qwen2-VL-2B-Instruct --recipe w4a8 --dry-run --device v5e
  python -m convert.verify out/float --reference goldens/qwen2_vl/public

DST appears only when it is complete. Until then DST.work holds the finished parts, a journal and
hidden states. After a kill, a full disk or Ctrl-C, the same command with --resume continues from
there. Memory depends on the widest layer, not on the number of layers.

exit status: 0 success, 2 bad usage or input
"""
    parser = Parser("python -m mquant_jax convert", __doc__ or "", epilog)
    parser.add_argument("src", metavar="SRC", help="folder with config.json and model.safetensors "
                        "(or an index and shards), or the name of a model in the Hugging Face "
                        "cache")  # fmt: skip
    parser.add_argument("dst", metavar="DST", type=Path, nargs="?",
                        help="checkpoint folder to write")  # fmt: skip
    parser.add_argument("--recipe", default="float", metavar="PRESET|FILE.json",
                        help="what is quantised and how (default: float); auto: w4a8 with "
                        "--budget")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="BITS", help="choose bits and groups for "
                        "each layer first, so many stored bits per weight in the mean, scales and "
                        "head included; see also `allocate`")  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="FILE.jsonl",
                        help="calibration samples for static activation scales "
                        "(default: the bundled set)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true",
                        help="replace DST if it is a checkpoint")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue an interrupted "
                        "conversion of the same inputs from DST.work")  # fmt: skip
    parser.add_argument("--restart", action="store_true",
                        help="remove DST.work of an earlier conversion and start over")  # fmt: skip
    parser.add_argument("--strict", nargs="?", const=",".join(WARNINGS), default="",
                        metavar="KIND,...", help="treat warnings of these kinds as errors: "
                        f"{', '.join(WARNINGS)}; without KIND all of them")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the plan, sizes, memory and "
                        "time without converting; needs only config.json")  # fmt: skip
    parser.add_argument("--device", action="append", default=[], choices=ACCELERATORS, help="with "
                        "--dry-run: say whether the result fits (repeatable)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _strict_kinds(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    for kind in kinds:
        choice(kind, "--strict", WARNINGS)
    return kinds


def _summary(dst: Path, manifest: dict[str, Any]) -> str:
    counts = ", ".join(f"{n:,} {kind}" for kind, n in manifest["dtype_counts"].items())
    size = manifest["total_bytes"] / 2**20
    return (
        f"{dst}: {manifest['family']}, recipe {manifest['recipe']['name']}, "
        f"{len(manifest['tensors'])} tensors, {size:.1f} MiB ({counts})"
    )


def _cost(stages: dict[str, float]) -> str:
    """Time by stage and peak memory, as one line."""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
    return f"{sum(stages.values()):.1f} s ({parts}), peak memory {peak_bytes() / 2**30:.2f} GiB"


def main(argv: list[str]) -> int:
    """Convert, and print a summary or with ``--json`` one object."""
    args: argparse.Namespace = _parser().parse_args(argv)
    if args.recipe == AUTO and args.budget is None:
        raise UserError("--recipe auto: chooses bits within a budget; add --budget 4.5")
    recipe = resolve_recipe("w4a8" if args.recipe == AUTO else args.recipe)
    if args.dry_run:
        if args.budget is not None:
            raise UserError("--budget: needs the weights, which --dry-run does not read; plan with "
                            "--recipe FILE.json that `allocate` wrote")  # fmt: skip
        show(dry_run(args.src, recipe, args.calibration, args.device), args.json)
        return OK
    if args.dst is None:
        raise UserError("DST is missing; only --dry-run works without it")
    if args.device:
        raise UserError("--device needs --dry-run; see also `inspect DST --memory`")
    keep_compiled_programs()
    stages: dict[str, float] = {}

    def note(name: str, seconds: float) -> None:
        stages[name] = stages.get(name, 0.0) + seconds

    with strict(_strict_kinds(args.strict)), listening(note):
        manifest = convert(
            args.src, args.dst, recipe, args.calibration, args.overwrite,
            resume=args.resume, restart=args.restart, budget=args.budget,
        )  # fmt: skip
    if args.json:
        keys = ("family", "tied_head", "recipe", "total_bytes", "dtype_counts")
        cost = {"seconds": stages, "peak_rss_bytes": peak_bytes()}
        print(json.dumps({"dst": str(args.dst), **{k: manifest[k] for k in keys}, **cost}))
    else:
        print(_summary(args.dst, manifest))
        print(_cost(stages))
    return OK
