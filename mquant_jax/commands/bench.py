"""Speed and memory of a checkpoint against float32 and bfloat16 of the same model."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp

from mquant_jax import cpu_features
from mquant_jax.cli_support import OK, Parser, add_no_verify, progress
from mquant_jax.errors import UserError
from mquant_jax.eval.speed import float_twin, measure, summary
from mquant_jax.eval.speed import table as speed_table
from mquant_jax.loading import load_model
from mquant_jax.runtime import choices
from mquant_jax.validate import count

EPILOG = """\
The float baselines have the same layer shapes and the original structure, without rotations.
Variants take turns in every repeat; a ratio is the median over repeats of (baseline time / this
checkpoint's time), so more than 1 means that the checkpoint is faster. A prefill begins with the
picture and ends with the first token; memory is what it holds, weights and cache included, by XLA's
analysis of the compiled program.
"""

_MOST = 1 << 20  # of any count: more could not be run, and would fail for memory
# Instructions that decide how fast integers are on a CPU.
_TELLING = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
            "asimddp", "i8mm")  # fmt: skip


def machine() -> dict:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "processor": cpu_features.model(),
        "instructions": [name for name in _TELLING if name in cpu_features.features()],
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str]) -> int:
    """Print a table and the ratios; with ``--json`` one object."""
    parser = Parser("python -m mquant_jax bench", __doc__, EPILOG)
    add = parser.add_argument
    add("checkpoint", help="folder written by convert.hf_to_flax")
    add("--text-tokens", type=int, default=256, metavar="N", help="text of a prompt (default 256)")
    add("--image-side", type=int, default=448, metavar="PX", help="picture, 0 for none (448)")
    add("--batch", type=int, default=1, metavar="N", help="prompts at once (default 1)")
    add("--new-tokens", type=int, default=16, metavar="N", help="decode steps (default 16)")
    add("--repeats", type=int, default=5, metavar="N", help="rounds counted (default 5)")
    add_no_verify(parser)
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    for name in ("text_tokens", "batch", "new_tokens", "repeats"):
        count(getattr(args, name), f"--{name.replace('_', '-')}", most=_MOST)
    count(args.image_side, "--image-side", least=0, most=_MOST)
    loaded = load_model(Path(args.checkpoint), verify=args.verify)
    family, config, recipe = loaded.family, loaded.config, loaded.manifest["recipe"]["name"]
    prompt = family.example_prompt(config, args.text_tokens, args.image_side)
    tokens = len(prompt.input_ids)
    if tokens + args.new_tokens > config.language.max_positions:
        raise UserError(
            f"{tokens} prompt tokens do not fit the context of {config.language.max_positions}: "
            "lower --text-tokens or --image-side"
        )
    batch = family.collate(config, [prompt] * args.batch)
    variants = {
        "float32": float_twin(family, config, loaded.model, jnp.float32),
        "bfloat16": float_twin(family, config, loaded.model, jnp.bfloat16),
        recipe: loaded.model,
    }
    prepared = {name: (module, batch) for name, module in variants.items()}
    timings = measure(prepared, args.new_tokens, args.repeats, progress)
    rows, ratios = summary(timings, args.batch, tokens, args.new_tokens, recipe)
    setup = {"prompt_tokens": tokens, "batch": args.batch, "new_tokens": args.new_tokens}
    if args.json:
        ran = choices.rows_of(choices.choices(loaded.model, batch))
        print(json.dumps(
            {"machine": machine(), **setup, "rows": rows, "ratios": ratios, "forms": ran}
        ))  # fmt: skip
        return OK
    pictured = " (with the picture's)" if prompt.grids else ""
    print(f"prompt {tokens} tokens{pictured}, batch {args.batch}, {machine()['device']}")
    print("\n" + speed_table(rows, ratios))
    return OK
