"""``convert --dry-run``: plan and cost of a conversion, from config.json only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mquant_jax.checkpoint.check import available_memory, run_bytes
from mquant_jax.checkpoint.foreign import refuse_quantised
from mquant_jax.checkpoint.hub import model_folder
from mquant_jax.checkpoint.plan import read_config
from mquant_jax.errors import UserError
from mquant_jax.files import read_json
from mquant_jax.layer_plan import LayerPlan, layer_plan, stored_bytes
from mquant_jax.loading import model_bytes
from mquant_jax.models.base import Family, abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.ptq.cost import Cost, Data, base_bytes, cost, measured_gflops
from mquant_jax.recipe import Recipe
from mquant_jax.report.plan import summary, table
from mquant_jax.runtime.memory import MemoryPlan, memory_plan

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class DryRun:
    """A plan and its expected cost.

    Attributes:
        read_back_bytes: memory to run the result once at the end of the conversion, on top of what
            the conversion still holds; that run is skipped if there is not enough.
        free_bytes: memory that is free now; ``None`` if unknown.
        fits: memory of the result on each requested device.
    """

    plan: LayerPlan
    cost: Cost
    gflops: float
    data: Data
    read_back_bytes: int
    free_bytes: int | None
    fits: list[MemoryPlan]

    @property
    def peak_bytes(self) -> int:
        """Expected peak memory of the conversion on this machine."""
        runs = self.free_bytes is None or self.read_back_bytes <= self.free_bytes
        base = base_bytes(self.plan.recipe)
        return max(self.cost.peak_bytes, base + self.read_back_bytes if runs else 0)

    def to_json(self) -> dict[str, Any]:
        cost = dataclasses.asdict(self.cost)
        return summary(self.plan) | {
            "peak_bytes": self.peak_bytes,
            "seconds": cost.pop("seconds"),
            "memory": {"least_bytes": cost.pop("peak_bytes"), **cost,
                       "read_back_bytes": self.read_back_bytes},
            "calibration": dataclasses.asdict(self.data),
            "gflops": self.gflops,
            "devices": [fit.to_json() for fit in self.fits],
        }  # fmt: skip

    def text(self) -> str:
        plan, c = self.plan, self.cost
        lines = [f"{plan.family}, recipe {plan.recipe.name}", "", table(plan), ""]
        lines.append(
            f"memory: {self.peak_bytes / _GIB:.1f} GiB; {c.peak_bytes / _GIB:.1f} GiB of them for "
            f"the conversion, reached at {c.peak_part}; the rest for a test run of the result, "
            "which is skipped if memory is short"
        )
        hours = c.seconds / 3600
        span = f"{hours:.1f} hours" if hours >= 2 else f"{c.seconds / 60:.0f} minutes"
        d = self.data
        lines.append(
            f"time: about {span} at {self.gflops:.0f} GFLOP/s, measured now; rough"
            + (f", for {d.samples} samples of {d.tokens} tokens and {d.patches} patches"
               if plan.recipe.needs_calibration else "")
        )  # fmt: skip
        for fit in self.fits:
            lines.append(
                f"{fit.device}: {'fits' if fit.fits else 'does not fit'}: {fit.total / 1e9:.1f} of "
                f"{fit.capacity / 1e9:.1f} GB with a context of {fit.context}; contexts up to "
                f"{fit.longest_context} fit"
            )
        return "\n".join(lines)


def dry_run(
    source: str | Path,
    recipe: Recipe,
    calibration: Path | None = None,
    devices: Sequence[str] = (),
) -> DryRun:
    """Plan a conversion without reading weights.

    Args:
        source: a folder with config.json, or a hub name in the local cache.
        calibration: its lines are counted; its samples are not read.
        devices: names of :data:`mquant_jax.runtime.memory.ACCELERATORS`.

    Raises:
        UserError: bad config, recipe or option.
    """
    folder = model_folder(source)
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder; SRC is a Hugging Face model folder")
    hf_config = read_json(folder / "config.json")
    refuse_quantised(hf_config, folder / "config.json")
    family = family_for(hf_config, folder / "config.json")
    plan = layer_plan(family, read_config(family, hf_config, folder), recipe,
                      stored_bytes(hf_config))  # fmt: skip
    data = _data(family, recipe, calibration)
    gflops = measured_gflops()
    fits = [memory_plan(family, plan.config, recipe, name) for name in devices]
    read_back = run_bytes(model_bytes(abstract_model(family, plan.config, recipe, jnp.float32)))
    return DryRun(plan, cost(plan, data, gflops), gflops, data, read_back, available_memory(), fits)


def _data(family: Family, recipe: Recipe, calibration: Path | None) -> Data:
    """The amount of calibration data, for samples of typical size.

    Raises:
        UserError: the file does not exist.
    """
    data = Data() if family.pictures else Data(patches=0)
    if calibration is None:
        return data
    if not calibration.is_file():
        raise UserError(f"--calibration {calibration}: no such file")
    with calibration.open("rb") as file:
        lines = sum(1 for line in file if line.strip())
    return dataclasses.replace(data, samples=max(1, min(lines, recipe.calibration.max_samples)))


def show(run: DryRun, as_json: bool) -> None:
    """Print the plan, as text or JSON."""
    print(json.dumps(run.to_json()) if as_json else run.text())
