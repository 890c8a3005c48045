"""Compare the speed of all variants of one model, interleaved in one run, as ratios to ours.

    python -m benchmarks.speed [--suite cpu-2b] [--json] [--save FILE] [--plot FILE]
    python -m benchmarks.speed --sweep image-side 224,448,896
    python -m benchmarks.speed --sweep images 1,4,8 --image-side 896 --layers 2
    python -m benchmarks.speed --sweep batch 1,8,32
    python -m benchmarks.speed --suite gpu-7b [--save FILE]

The model has a published model's layer shapes and random weights, whose values do not affect the
speed. Both towers and the vocabulary are cut by the same factor (``--layers`` of 28), so that each
part keeps its share of the time. Suites:

``cpu-2b``   Qwen2-VL-2B, float32 between integer products
``gpu-7b``   Qwen2-VL-7B, bfloat16 between integer products, for GPUs and TPUs; without float32

Each repeat runs all variants once:

``float32``, ``bfloat16``   the original structure
``w8a8-dynamic``, ``w4a8-dynamic``   one activation scale per token, computed at run time
``w4a8-shared``   static, one scale for all tokens
``w4a8``          static, scales by token class (MSQ), tokens in their original order: the default
``w4a8-aifs``     the same with the visual tokens moved to the front (AIFS)

A ratio is the other variant's time / the time of ``w4a8``: more than 1 means ours is faster.
Prefill runs from the pictures to the first token, so it is the time to first token. Memory is
prefill's, weights included, according to XLA's analysis of the compiled program.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.aot.sizes import MODELS
from benchmarks.output import add_output_options, deliver, save
from benchmarks.random_checkpoint import cut_config
from mquant_jax.cli_support import OK, Parser, peak_bytes, progress, run_cli
from mquant_jax.commands.bench import machine
from mquant_jax.errors import UserError
from mquant_jax.eval.speed import measure, summary
from mquant_jax.eval.speed import table as speed_table
from mquant_jax.models.base import VLM, Batch, Family, abstract_model
from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.nn.params import abstract_params, get_params, parameter_bytes, set_params
from mquant_jax.numerics import QWeight
from mquant_jax.ops.dense import held
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.pipeline import sink_rule
from mquant_jax.recipe import Recipe, Section
from mquant_jax.runtime.tokens import arrange

LAYERS = 28  # layers of the published models
NOISE = 2**20 + 7  # random values, repeated to fill a tensor; odd, so that rows differ
OURS, AIFS = "w4a8", "w4a8-aifs"
SWEEPS = ("image-side", "images", "text-tokens", "batch")


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite's defaults; ``float_type`` is the type between integer products."""

    model: str
    float_type: Any
    layers: int
    text_tokens: int
    leaves_out: tuple[str, ...] = ()


SUITES = {
    "cpu-2b": Suite("qwen2_vl-2b", jnp.float32, 4, 256),
    "gpu-7b": Suite("qwen2_vl-7b", jnp.bfloat16, 8, 768, ("float32",)),
}


def recipes(float_type: Any) -> dict[str, tuple[Recipe, Any]]:
    """Return variant -> recipe and float type, the float baselines first."""
    ours = PRESETS["w4a8"]

    def dynamic(bits: int) -> Recipe:
        section = Section(bits, None, "dynamic")
        return dataclasses.replace(
            ours, vision=section, connector=section, language=section,
            head=Section(8, None, "dynamic"),
        )  # fmt: skip

    return {
        "float32": (Recipe(), jnp.float32),
        "bfloat16": (Recipe(), jnp.bfloat16),
        "w8a8-dynamic": (dynamic(8), float_type),
        "w4a8-dynamic": (dynamic(4), float_type),
        "w4a8-shared": (
            dataclasses.replace(ours, modality_scales=False, sink_class=False), float_type
        ),
        OURS: (ours, float_type),
    }  # fmt: skip


def random_model(family: Family, config: Any, recipe: Recipe, dtype: Any) -> VLM:
    """Build a model with random weights of realistic scale, stored as loading stores them."""
    model = abstract_model(family, config, recipe, dtype)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(NOISE, np.float32)  # drawn once and repeated, for speed

    def tensor(name: str, like: Any) -> Any:
        if isinstance(like, QWeight):
            top = 2 ** (like.bits - 1) - 1
            shape = (*like.values.shape[:-1], like.in_features)
            values = np.resize(rng.integers(-top, top + 1, NOISE, np.int8), shape)
            scale = np.full(like.scale.shape, 1.7 / top * like.in_features**-0.5, np.float32)
            q = QWeight(values, scale, like.in_features, like.bits, "int8")
            return held(q)
        if name.endswith("norm/weight"):
            return np.ones(like.shape, like.dtype)
        if name.endswith("act_scale"):
            return np.full(like.shape, 0.03, like.dtype)
        if len(like.shape) < 2:
            return np.zeros(like.shape, like.dtype)
        return np.resize((noise * like.shape[-1] ** -0.5).astype(like.dtype), like.shape)

    params = {name: tensor(name, like) for name, like in abstract_params(model).items()}
    if recipe.marks_sinks:
        params |= sink_rule([0], [])
    set_params(model, params)
    return model


def cut_model(model: str, layers: int) -> Qwen2VLConfig:
    """Return a config with both towers and the vocabulary cut alike, its head untied as rotations
    need."""
    vocab = -(-MODELS[model]["vocab_size"] * layers // (LAYERS * 64)) * 64
    config = Qwen2VLConfig.from_hf(cut_config(model, layers, max(vocab, 4096)))
    language = dataclasses.replace(config.language, tied_head=False)
    return dataclasses.replace(config, language=language)


def example(
    config: Any, text_tokens: int, image_side: int, batch: int, images: int = 1
) -> tuple[Batch, int]:
    """Return a batch of equal prompts and one prompt's length in tokens; pictures after the first
    go to the end of the prompt."""
    prompt = FAMILY.example_prompt(config, text_tokens, image_side)
    if images > 1 and image_side:
        visual = FAMILY.example_prompt(config, 0, image_side).input_ids
        prompt = dataclasses.replace(
            prompt,
            input_ids=[*prompt.input_ids, *visual * (images - 1)],
            grids=prompt.grids * images,
            patches=np.tile(prompt.patches, (images, 1)),
        )
    return FAMILY.collate(config, [prompt] * batch), len(prompt.input_ids)


def run_once(
    config: Any, models: dict[str, nnx.Module], args: Any, at: dict[str, int]
) -> dict[str, Any]:
    """Return the table and ratios for one set of sizes: a value for each of ``SWEEPS``."""
    side, batch = at["image-side"], at["batch"]
    prompts, tokens = example(config, at["text-tokens"], side, batch, at["images"])
    variants = {name: (model, prompts) for name, model in models.items()}
    if OURS in models and side:
        variants[AIFS] = (models[OURS], arrange(prompts)[0])
    timings = measure(variants, args.new_tokens, args.repeats, progress)
    rows, ratios = summary(timings, batch, tokens, args.new_tokens, OURS)
    for row in rows:
        row["weight_bytes"] = parameter_bytes(get_params(variants[row["variant"]][0]))
    return {
        "prompt_tokens": tokens, "visual_tokens": int((prompts.token_class[0] == 1).sum()),
        "image_side": side, "images": at["images"], "batch": batch, "rows": rows,
        "ratios": named(ratios),
    }  # fmt: skip


def named(ratios: dict[str, float]) -> dict[str, float]:
    """Add the ratios under the names of what they compare."""
    out = dict(ratios)
    for part in ("prefill", "decode"):
        for name, other in (
            (f"static_vs_dynamic_{part}", f"{part}_vs_w4a8-dynamic"),
            (f"msq_vs_shared_{part}", f"{part}_vs_w4a8-shared"),
        ):
            if other in ratios:
                out[name] = ratios[other]
        if f"{part}_vs_{AIFS}" in ratios:  # inverted: AIFS is the numerator
            out[f"aifs_vs_masked_{part}"] = 1 / ratios[f"{part}_vs_{AIFS}"]
    return out


def table(result: dict[str, Any]) -> str:
    """Format one run as text."""
    head = (
        f"{result['prompt_tokens']} tokens ({result['visual_tokens']} visual), batch "
        f"{result['batch']}\n"
    )
    return head + speed_table(result["rows"], result["ratios"])


def plot(results: Sequence[dict[str, Any]], axis: str, path: Path) -> None:
    """Plot prefill and decode speed: bars for one run, lines for a sweep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [r["variant"] for r in results[0]["rows"]]
    keys = ("prefill_tokens_per_second", "decode_tokens_per_second")
    for ax, key in zip(axes, keys, strict=True):
        values = {n: [dict_of(r)[n][key] for r in results] for n in names}
        if len(results) == 1:
            bars = ax.barh(names, [v[0] for v in values.values()])
            ax.bar_label(bars, fmt="%.0f", padding=3)
            ax.invert_yaxis()
            ax.margins(x=0.15)
        else:
            for name, v in values.items():
                ax.plot([r[axis] for r in results], v, marker="o", label=name)
            ax.set_xlabel(axis.replace("_", " "))
            ax.set_ylim(bottom=0)
            ax.legend(fontsize="small")
        ax.set_title(key.replace("_per_second", " per second").replace("_", " "))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def dict_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in result["rows"]}


def numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 0:
        raise ValueError(text)
    return values


def _sweep(args: Any) -> tuple[str, list[int]]:
    if args.sweep is None:
        return "image-side", [args.image_side]
    name, values = args.sweep
    try:
        if name in SWEEPS:
            return name, numbers(values)
    except ValueError:
        pass
    raise UserError(
        f"--sweep {name} {values}: expected one of {', '.join(SWEEPS)} and numbers, "
        "separated by commas, as in --sweep batch 1,8,32"
    )


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.speed", __doc__ or "")
    add: Callable[..., Any] = parser.add_argument
    add("--suite", choices=tuple(SUITES), default="cpu-2b", help="layer shapes (default cpu-2b)")
    add("--layers", type=int, metavar="N", help="layers of each tower (4; gpu-7b: 8)")
    add("--text-tokens", type=int, metavar="N", help="text per prompt (256; gpu-7b: 768)")
    add(
        "--image-side",
        type=int,
        default=448,
        metavar="PX",
        help="picture size (default 448; 0: none)",
    )
    add("--images", type=int, default=1, metavar="N", help="pictures per prompt (default 1)")
    add("--batch", type=int, default=1, metavar="N", help="prompts per batch (default 1)")
    add("--new-tokens", type=int, default=16, metavar="N", help="decode steps (default 16)")
    add("--repeats", type=int, default=5, metavar="N", help="measured rounds (default 5)")
    add("--sweep", nargs=2, metavar=("WHAT", "VALUES"), help="several runs: " + ", ".join(SWEEPS))
    add("--variant", action="append", metavar="NAME", help="only this one and w4a8; repeatable")
    add_output_options(parser)
    add("--plot", type=Path, metavar="FILE", help="draw the speeds (PNG)")
    args = parser.parse_args(argv)
    suite = SUITES[args.suite]
    args.layers = suite.layers if args.layers is None else args.layers
    args.text_tokens = suite.text_tokens if args.text_tokens is None else args.text_tokens
    for name in ("layers", "text_tokens", "images", "batch", "new_tokens", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install -e '.[bench]'")
    axis, values = _sweep(args)
    known = recipes(suite.float_type)
    wanted = args.variant or [name for name in known if name not in suite.leaves_out]
    for name in wanted:
        if name not in known:
            raise UserError(f"--variant {name}: expected one of {', '.join(known)}")
    config = cut_model(suite.model, args.layers)
    chosen = {n: known[n] for n in known if n in wanted or n == OURS}
    models = {
        name: random_model(FAMILY, config, recipe, dtype)
        for name, (recipe, dtype) in progress(list(chosen.items()), "random weights")
    }
    shape = {"text-tokens": args.text_tokens, "image-side": args.image_side, "batch": args.batch,
             "images": args.images}  # fmt: skip
    out: dict[str, Any] = {
        "machine": machine(), "suite": args.suite, "layers": args.layers, "of_layers": LAYERS,
        "new_tokens": args.new_tokens, "repeats": args.repeats,
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    for value in values:
        results.append(run_once(config, models, args, shape | {axis: value}))
        out |= {"peak_process_bytes": peak_bytes()}
        out |= results[0] if args.sweep is None else {"sweep": axis, "runs": results}
        save(out, args.save)  # keeps the finished points if a later one runs out of memory
        if args.sweep:
            print(table(results[-1]), end="\n\n", file=sys.stderr)
    if args.plot:
        key = {"text-tokens": "prompt_tokens", "images": "visual_tokens"}.get(axis)
        key = key or axis.replace("-", "_")
        plot(results, key, args.plot)
    deliver(out, args, lambda _: "\n\n".join(map(table, results)))
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
