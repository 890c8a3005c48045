"""Mixed precision: bits and groups for each layer, the least error within a budget of bits.

Every layer that a recipe quantises to 4 bits may take 4 bits per channel, 4 bits in groups or 8
bits per channel. Costs come from :mod:`mquant_jax.ptq.sensitivity`. All layers begin with the
cheapest choice; then the step that lowers the sum of errors most for its bits is taken, as long as
the budget holds it (the greedy solution of a multiple-choice knapsack on the lower convex hull of
each layer's costs).
"""

from __future__ import annotations

import dataclasses
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mquant_jax.checkpoint.hub import model_folder
from mquant_jax.checkpoint.plan import plan, read_config
from mquant_jax.checkpoint.source import Reader
from mquant_jax.checkpoint.tensor_file import PARTIAL
from mquant_jax.cli_support import progress
from mquant_jax.errors import UserError
from mquant_jax.files import read_json
from mquant_jax.layer_plan import layer_plan
from mquant_jax.models.base import Config, Family
from mquant_jax.models.registry import family_for
from mquant_jax.ptq.calibration_data import calibration_chunks
from mquant_jax.ptq.pipeline import Batches, Conversion, untied
from mquant_jax.ptq.sensitivity import Cost, Sensitivity, stored_bits
from mquant_jax.ptq.states import States
from mquant_jax.ptq.walk import Progress, no_progress
from mquant_jax.recipe import Recipe
from mquant_jax.sections import Rule, Section
from mquant_jax.validate import number

GROUP = 64
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The outcome.

    Attributes:
        recipe: the base recipe with one rule for each layer that differs from it.
        bits: stored bits per quantised weight, the head's included and the embedding's not.
        before, after: sum of the measured layers' relative squared errors under the base recipe,
            and under the new one.
        sections: path of each measured layer -> what it got.
    """

    recipe: Recipe
    bits: float
    before: float
    after: float
    sections: dict[str, Section]


def choose_for(
    src: str | Path, recipe: Recipe, budget: float, calibration: Path | None = None
) -> Choice:
    """Choose bits for a Hugging Face model folder.

    Args:
        recipe: what the rules are added to; its own rules stay and come first.
        budget: mean stored bits per weight over all quantised layers and the head.
        calibration: a JSONL file of samples; ``None``: the bundled set.

    Raises:
        UserError: bad input, or a budget below what the recipe takes at least.
    """
    reader = Reader(model_folder(src))
    family = family_for(reader.config, reader.folder / "config.json")
    todo = plan(family, read_config(family, reader.config, reader.folder), reader)
    config, params = todo.config, todo.tensors(reader)
    check_budget(family, config, recipe, budget)  # before anything is read
    states = States()
    processor = family.processor(reader.folder, config)
    limit = recipe.calibration.max_samples
    chunks = calibration_chunks(calibration, processor, states, limit, family.pictures)
    try:
        return choose(family, config, recipe, budget, params, chunks.batches, progress)
    finally:
        states.close()


def choose_once(file: Path, recipe: Recipe, budget: float, make: Callable[[], Choice]) -> Recipe:
    """The recipe that ``make`` chooses, or the one that an earlier run left in ``file``.

    Args:
        file: where it is kept for a run that is continued; appears when it is complete.
        recipe: what the rules are added to.

    Raises:
        UserError: ``file`` holds the choice for another recipe or budget.
    """
    asked = {"budget": budget, "from": recipe.to_json()}
    if file.exists():
        found = read_json(file)
        if any(found.get(key) != value for key, value in asked.items()):
            raise UserError(
                f"{file}: was chosen for another recipe or budget; use the same --recipe and "
                "--budget with --resume, or --restart"
            )
        return Recipe.from_json(found["recipe"], str(file))
    chosen = make().recipe
    partial = file.with_name(file.name + PARTIAL)
    text = json.dumps(asked | {"recipe": chosen.to_json()}, indent=1) + "\n"
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
    return chosen


def choose(
    family: Family,
    config: Config,
    recipe: Recipe,
    budget: float,
    params: Mapping[str, Any],
    batches: Batches,
    progress: Progress = no_progress,
) -> Choice:
    """:func:`choose_for` a model in memory, as :class:`Conversion` takes it."""
    check_budget(family, config, recipe, budget)
    if recipe.rotate:
        config, params = untied(config, params)

    def options(path: str, in_features: int) -> Sequence[Section]:
        own = recipe.section_for(path)
        if not _open(recipe, path):
            return ()
        channel = dataclasses.replace(own, group_size=None)
        some = [channel, dataclasses.replace(channel, w_bits=8)]
        if in_features % GROUP == 0 and in_features > GROUP:
            some.insert(1, dataclasses.replace(channel, group_size=GROUP))
        return some

    look = Sensitivity(options, recipe.weights.clip)
    Conversion(family, config, recipe, params, batches, progress=progress).measure(look)
    fixed = _fixed(family, config, recipe, look.costs)
    chosen = allocate(look.costs, look.sizes, budget, fixed)
    return _outcome(recipe, look, chosen, fixed)


def allocate(
    costs: Mapping[str, Sequence[Cost]],
    sizes: Mapping[str, Size],
    budget: float,
    fixed: tuple[int, float] = (0, 0.0),
) -> dict[str, Cost]:
    """Choose one cost for each layer.

    Args:
        sizes: ``(out, in)`` of each layer.
        budget: mean bits per weight.
        fixed: weights and bits of the layers that have no choice.
    """
    steps = {path: _hull(some) for path, some in costs.items()}
    chosen = {path: some[0] for path, some in steps.items()}
    weights = {path: out * k for path, (out, k) in sizes.items()}
    left = budget * (fixed[0] + sum(weights.values())) - fixed[1]
    left -= sum(chosen[path].bits * weights[path] for path in chosen)
    queue: list[tuple[float, str, int]] = []

    def offer(path: str, at: int) -> None:
        if at + 1 < len(steps[path]):
            a, b = steps[path][at : at + 2]
            gain = (a.error - b.error) / ((b.bits - a.bits) * weights[path])
            heapq.heappush(queue, (-gain, path, at + 1))

    for path in chosen:
        offer(path, 0)
    while queue:
        _, path, at = heapq.heappop(queue)
        price = (steps[path][at].bits - chosen[path].bits) * weights[path]
        if price <= left:
            left -= price
            chosen[path] = steps[path][at]
            offer(path, at)
    return chosen


def _hull(costs: Sequence[Cost]) -> list[Cost]:
    """The costs on the lower convex hull of error over bits, cheapest first."""
    hull: list[Cost] = []
    for cost in sorted(costs, key=lambda c: (c.bits, c.error)):
        if hull and cost.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], cost) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(cost)
    return hull


def _slope(a: Cost, b: Cost) -> float:
    return (b.error - a.error) / (b.bits - a.bits)


def check_budget(family: Family, config: Config, recipe: Recipe, budget: float) -> None:
    """Raises:
    UserError: the budget is no number of bits, or below what the recipe takes at least.
    """
    number(budget, "--budget", least=0.0)
    weights, bits, free = 0, 0.0, False
    for path, count, k in _counted(family, config, recipe):
        section, open_ = recipe.section_for(path), _open(recipe, path)
        least = dataclasses.replace(section, group_size=None) if open_ else section
        free |= open_
        weights += count
        bits += count * stored_bits(least, k)
    if not free:
        raise UserError(f"recipe {recipe.name!r} leaves nothing to choose: it quantises no layer "
                        "to 4 bits without a rule; take w4a8")  # fmt: skip
    if budget < bits / weights:
        raise UserError(
            f"--budget {budget:g}: recipe {recipe.name!r} takes {bits / weights:.3f} bits per "
            "weight at least on this model, its head included; expected more"
        )


def mean_bits(family: Family, config: Config, recipe: Recipe) -> float:
    """Stored bits per weight of a recipe: over all quantised layers and the head, scales included,
    the embedding not counted."""
    weights, bits = _totals(recipe, _counted(family, config, recipe))
    return bits / max(weights, 1)


def _totals(recipe: Recipe, layers: Iterable[tuple[str, int, int]]) -> tuple[int, float]:
    """Weights and stored bits of layers, as :func:`_counted` yields them."""
    weights, bits = 0, 0.0
    for path, count, k in layers:
        weights += count
        bits += count * stored_bits(recipe.section_for(path), k)
    return weights, bits


def _fixed(
    family: Family, config: Config, recipe: Recipe, measured: Mapping[str, Any]
) -> tuple[int, float]:
    """Weights and stored bits of the quantised layers that were not measured."""
    layers = _counted(family, config, recipe)
    return _totals(recipe, (layer for layer in layers if layer[0] not in measured))


def _open(recipe: Recipe, path: str) -> bool:
    """Whether bits may be chosen for a layer."""
    return recipe.section_for(path).w_bits == 4 and recipe.rule_for(path) is None


def _counted(family: Family, config: Config, recipe: Recipe) -> Iterator[tuple[str, int, int]]:
    """Path, weights and inputs of each layer that a budget counts: quantised, not the embedding."""
    for layer in layer_plan(family, config, recipe).layers:
        if layer.w_bits <= 8 and layer.path != "language/embedding":
            yield layer.path, layer.out_features * layer.in_features, layer.in_features


def _outcome(
    recipe: Recipe, look: Sensitivity, chosen: Mapping[str, Cost], fixed: tuple[int, float]
) -> Choice:
    rules, base = list(recipe.rules), 0.0
    for path, cost in chosen.items():
        own = recipe.section_for(path)
        base += next((c.error for c in look.costs[path] if c.section == own), cost.error)
        changes = {
            name: getattr(cost.section, name)
            for name in ("w_bits", "group_size")
            if getattr(cost.section, name) != getattr(own, name)
        }
        if changes:
            rules.append(Rule.of((path, changes)))
    sizes = {path: out * k for path, (out, k) in look.sizes.items()}
    bits = fixed[1] + sum(cost.bits * sizes[path] for path, cost in chosen.items())
    return Choice(
        dataclasses.replace(recipe, name=f"{recipe.name}-auto", rules=tuple(rules)),
        bits / (fixed[0] + sum(sizes.values())),
        base,
        sum(cost.error for cost in chosen.values()),
        {path: cost.section for path, cost in chosen.items()},
    )
