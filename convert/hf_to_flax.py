"""Convert a Hugging Face model folder into a checkpoint folder, quantised as a recipe says."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.plan import Plan, plan
from convert.reader import Reader
from models.base import Batch, Family, abstract_model
from models.registry import family_for
from mquant_jax.atomic import check_destination
from mquant_jax.checkpoint import MANIFEST, save
from mquant_jax.cli_support import OK, Parser, progress, run_cli, warn
from mquant_jax.compile_cache import keep_compiled_programs
from mquant_jax.errors import UserError
from mquant_jax.presets import METHODS, PRESETS, resolve_recipe
from mquant_jax.recipe import SECTIONS, Recipe


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
    epilog = f"""recipes (weights and activations of each part; a JSON file may say more):
{presets_table()}
  methods to compare with, all W4A8 static: {", ".join(METHODS)}

examples:
  python -m convert.hf_to_flax Qwen2-VL-2B-Instruct out/float
  python -m convert.hf_to_flax Qwen2-VL-2B-Instruct out/w4a8 --recipe w4a8 --calibration my.jsonl
  python -m convert.verify out/float --reference goldens/qwen2_vl/public

exit status: 0 success, 2 bad usage or input. DST appears only when it is complete.
"""
    parser = Parser("python -m convert.hf_to_flax", __doc__ or "", epilog)
    parser.add_argument("src", metavar="SRC", type=Path, help="folder with config.json and "
                        "model.safetensors (or its index and shards)")  # fmt: skip
    parser.add_argument("dst", metavar="DST", type=Path, help="checkpoint folder to write")
    parser.add_argument("--recipe", default="float", metavar="PRESET|FILE.json",
                        help="what is quantised and how (default: float)")  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="FILE.jsonl",
                        help="samples that set the static activation scales "
                        "(default: the bundled set)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true",
                        help="replace DST, if it is a checkpoint")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def convert(
    src: Path, dst: Path, recipe: Recipe, calibration: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Convert ``src`` into the checkpoint ``dst``; everything cheap is checked first.

    Returns:
        The manifest, as written to mquant.json.

    Raises:
        UserError: bad input; nothing was written.
    """
    check_destination(dst, MANIFEST, overwrite)
    if calibration is not None and not calibration.is_file():
        raise UserError(f"--calibration {calibration}: no such file")
    reader = Reader(src)
    family = family_for(reader.config, src / "config.json")
    todo = plan(family, read_config(family, reader), reader)
    _check_recipe(family, todo, recipe)
    _check_ties(reader.config, todo)
    batch = _calibration_batch(family, todo, recipe, src, calibration)
    params: dict[str, Any] = todo.read(reader, progress)
    config, report = todo.config, None
    if recipe.changes_weights:
        from mquant_jax.ptq.pipeline import quantize_params, untied

        config, params = untied(config, params) if recipe.rotate else (config, params)
        params, report = quantize_params(family, config, recipe, params, batch, progress)
    return save(
        dst,
        params,
        family=family.name,
        hf_config=reader.config,
        recipe=recipe,
        tied_head=config.language.tied_head,
        files=[src / "config.json", *reader.side_files()],
        report=report,
        overwrite=overwrite,
    )


def read_config(family: Family, reader: Reader) -> Any:
    """The family's config object.

    Raises:
        UserError: a key of config.json is missing or has an impossible value.
    """
    try:
        return family.config_from_hf(reader.config)
    except (TypeError, ValueError, AttributeError, LookupError, ZeroDivisionError) as e:
        path = reader.folder / "config.json"
        raise UserError(f"{path}: a key has an impossible value ({family.name}): {e}") from e


def _check_recipe(family: Family, todo: Plan, recipe: Recipe) -> None:
    """Shapes and recipe fit together (group sizes divide, say).

    Raises:
        UserError: they do not.
    """
    try:
        abstract_model(family, todo.config, recipe)
    except ValueError as e:
        raise UserError(f"recipe {recipe.name!r} does not fit this model: {e}") from e


def _check_ties(hf: dict[str, Any], todo: Plan) -> None:
    if todo.tied_head and hf.get("tie_word_embeddings") is False:
        warn("config.json says the head is not tied, but the checkpoint has no head of its own; "
             "the embedding is used")  # fmt: skip


def _calibration_batch(
    family: Family, todo: Plan, recipe: Recipe, src: Path, path: Path | None
) -> Batch | None:
    """Calibration data, read before the weights so that bad data fails early."""
    if not recipe.needs_calibration:
        if path is not None:
            warn(f"--calibration is not used: recipe {recipe.name!r} needs no data")
        return None
    from mquant_jax.ptq.calibration_data import load_calibration

    processor, limit = family.processor(src, todo.config), recipe.calibration.max_samples
    return processor.collate(load_calibration(path, processor, limit, family.pictures))


def _summary(dst: Path, manifest: dict[str, Any]) -> str:
    counts = ", ".join(f"{n:,} {kind}" for kind, n in manifest["dtype_counts"].items())
    size = manifest["total_bytes"] / 2**20
    return (
        f"{dst}: {manifest['family']}, recipe {manifest['recipe']['name']}, "
        f"{len(manifest['tensors'])} tensors, {size:.1f} MiB ({counts})"
    )


def _run(argv: list[str]) -> int:
    args: argparse.Namespace = _parser().parse_args(argv)
    recipe = resolve_recipe(args.recipe)
    keep_compiled_programs()
    manifest = convert(args.src, args.dst, recipe, args.calibration, args.overwrite)
    if args.json:
        keys = ("family", "tied_head", "recipe", "total_bytes", "dtype_counts")
        print(json.dumps({"dst": str(args.dst), **{k: manifest[k] for k in keys}}))
    else:
        print(_summary(args.dst, manifest))
    return OK


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 success, 2 bad usage or input."""
    return run_cli(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
