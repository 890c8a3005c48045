"""The pictures of the documentation: how the method works, on numbers drawn here, and the report of
a checkpoint.

    python -m benchmarks.figures CKPT --docs docs

writes ``docs/figures/*.png`` and ``docs/reports/demo.html``; CKPT is the demo model's ``w4a8``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from mquant_jax.commands import report
from mquant_jax.hadamard import plan_rotation
from mquant_jax.numerics import INT_MAX, quantize_weight
from mquant_jax.ptq.gptq import gptq, prepare, relative_output_error
from mquant_jax.report import plots
from mquant_jax.report.page import PAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FROM_REPORT = ("outliers-language-layers", "activation-scales-language-layers")
_WIDTH, _ROWS = 256, 512


def activations(rng: np.random.Generator) -> np.ndarray:
    """Float32 ``[_ROWS, _WIDTH]``, three channels 20 to 60 times larger than the rest."""
    x = rng.normal(size=(_ROWS, _WIDTH)).astype(np.float32)
    x[:, [30, 100, 210]] *= (60.0, 20.0, 35.0)
    return x


def rotation() -> Figure:
    """Channels before and after a rotation, with the int8 step that each needs."""
    x = activations(np.random.default_rng(0))
    turned = np.asarray(plan_rotation(_WIDTH)(jnp.asarray(x)))
    figure = plots.empty(9.0, 3.0, "A rotation spreads outlier channels over all channels")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (name, values, colour) in zip(
        axes,
        (("before", x, plots.VERMILION), ("after", turned, plots.BLUE)),
        strict=True,
    ):
        largest = np.abs(values).max(0)
        ax.bar(range(_WIDTH), largest, width=1.0, color=colour)
        ax.set_title(f"{name}: one int8 step is {largest.max() / INT_MAX[8]:.2f}", fontsize=10)
        ax.set_xlabel("channel")
    axes[0].set_ylabel("largest magnitude")
    return figure


def classes() -> Figure:
    """The int8 grid of one scale for all tokens, and of a scale per class."""
    rng = np.random.default_rng(1)
    text, visual = rng.normal(0, 0.15, 20_000), rng.normal(0, 4.0, 20_000)
    figure = plots.empty(9.0, 3.0, "Text and visual tokens need different scales")
    ax = figure.subplots()
    bins = np.geomspace(1e-3, 30, 120)
    for name, values, colour in (("text", text, plots.BLUE), ("visual", visual, plots.VERMILION)):
        ax.hist(np.abs(values), bins, color=colour, alpha=0.6, label=f"{name} activations")
        step = np.abs(values).max() / INT_MAX[8]
        ax.axvline(step, color=colour, linestyle="--", label=f"one int8 step of {name}'s own scale")
    ax.set_xscale("log")
    ax.set_xlabel("magnitude (values below half a step round to zero)")
    ax.set_ylabel("values")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def clipping() -> Figure:
    """Rounding and clipping error of int4 weights for every clip."""
    weight = np.random.default_rng(2).normal(size=100_000)
    shares = np.linspace(0.2, 1.0, 81)
    inside, outside = [], []
    for clip in shares * np.abs(weight).max():
        scale = clip / INT_MAX[4]
        rounded = np.clip(np.round(weight / scale), -INT_MAX[4] - 1, INT_MAX[4]) * scale
        beyond = np.abs(weight) > clip + scale / 2
        error = (weight - rounded) ** 2 / np.sum(weight**2)
        inside.append(100 * error[~beyond].sum())
        outside.append(100 * error[beyond].sum())
    figure = plots.empty(
        9.0, 3.0, "The clip of 4-bit weights: rounding error against clipping error"
    )
    ax = figure.subplots()
    total = np.add(inside, outside)
    for name, values, colour, style in (
        ("rounding", inside, plots.BLUE, "--"),
        ("clipping", outside, plots.VERMILION, ":"),
        ("both", total, plots.BLACK, "-"),
    ):
        ax.plot(shares, values, color=colour, linestyle=style, label=name)
    ax.plot(shares[total.argmin()], total.min(), "o", color=plots.BLACK, label="least error")
    ax.set_ylim(0, 4)
    ax.set_xlabel("clip / largest magnitude")
    ax.set_ylabel("error (% of the weights' energy)")
    ax.legend(fontsize=9, frameon=False)
    return figure


def rounding() -> Figure:
    """Output error of rounding to nearest and of GPTQ on inputs of any correlation."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(64, _WIDTH)).astype(np.float32)
    shared = rng.normal(size=(_ROWS, 16)).astype(np.float32) @ rng.normal(size=(16, _WIDTH))
    own = rng.normal(size=(_ROWS, _WIDTH))
    rows: dict[str, list[float]] = {"round to nearest": [], "GPTQ": []}
    mixes = np.linspace(0.0, 0.95, 8)
    nearest = quantize_weight(jnp.asarray(weight), 4)
    for mix in mixes:
        x = (np.sqrt(1 - mix) * own + np.sqrt(mix) * shared / 4).astype(np.float32)
        inputs = prepare(x.T @ x)
        for name, q in (("round to nearest", nearest),
                        ("GPTQ", gptq(weight, inputs, nearest.scale, 4))):  # fmt: skip
            rounded = np.asarray(q.dequantize())
            rows[name].append(100 * relative_output_error(weight, rounded, x.T @ x))
    figure = plots.empty(9.0, 3.0, "GPTQ moves the rounding error to where inputs are small")
    ax = figure.subplots()
    for (name, values), colour, mark in zip(
        rows.items(), (plots.VERMILION, plots.BLUE), ("s", "o"), strict=True
    ):
        ax.plot(mixes, values, color=colour, marker=mark, label=name)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("share of the inputs' energy in 16 of 256 directions")
    ax.set_ylabel("error of the output (%)")
    ax.legend(fontsize=9, frameon=False)
    return figure


FIGURES = {"rotation": rotation, "classes": classes, "clipping": clipping, "rounding": rounding}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("checkpoint", help="the demo model, converted with recipe w4a8")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder (default docs)")
    args = parser.parse_args()
    plots.need_matplotlib()
    figures, reports = args.docs / "figures", args.docs / "reports"
    figures.mkdir(parents=True, exist_ok=True)
    reports.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (figures / f"{name}.png").write_bytes(plots.png(draw()))
    with tempfile.TemporaryDirectory() as folder:
        report.main([str(args.checkpoint), "-o", folder])
        shutil.copyfile(Path(folder) / PAGE, reports / "demo.html")
        for name in FROM_REPORT:
            shutil.copyfile(Path(folder) / f"{name}.png", figures / f"{name}.png")


if __name__ == "__main__":
    main()
