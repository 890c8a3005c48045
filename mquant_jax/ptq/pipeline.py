"""Float tensors and calibration prompts in, quantised tensors and a report out, part by part.

At most one part's weights are in memory. The rounding pass reads each weight once. Balancing and
smoothing need another pass (over the float model before the rotation), and so does the search for
sinks (over the rotated float model). SmoothQuant reads the layers that it scales once more. Scales
are learned block by block in the rounding pass; learning those of the whole model at the end needs
both models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from mquant_jax.checkpoint.writer import Rows, by_part
from mquant_jax.errors import UserError
from mquant_jax.lazy import Lazy, Tensors, lazy
from mquant_jax.models.base import VLM, Batch, Config, Family, abstract_model, with_head
from mquant_jax.nn.decoder import SinkRule
from mquant_jax.nn.params import Params, abstract_params, layer_path, set_params
from mquant_jax.numerics import QWeight
from mquant_jax.ptq.balance import balance_params
from mquant_jax.ptq.coverage import coverage, float_ranges
from mquant_jax.ptq.factors import is_weight, placed
from mquant_jax.ptq.ledger import Ledger
from mquant_jax.ptq.prefix import prefix_ids, prefix_params
from mquant_jax.ptq.rotate import rotate_params
from mquant_jax.ptq.scales import round_weight
from mquant_jax.ptq.sequential import Quantiser, Sink
from mquant_jax.ptq.sinks import find_sinks, flat
from mquant_jax.ptq.smooth import smooth_params
from mquant_jax.ptq.states import States
from mquant_jax.ptq.statistics import Statistics
from mquant_jax.ptq.tune import tune
from mquant_jax.ptq.walk import Progress, RowChange, Visitor, Walk, no_progress, working
from mquant_jax.recipe import Recipe, Section
from mquant_jax.stages import stage

Batches = Batch | Sequence[Batch]
# Parts without a visit in any walk: tables and single vectors.
OUTSIDE = ("language.embedding", "language.norm", "language.head", "language.sinks",
           "vision.class_token", "vision.positions", "vision.query")  # fmt: skip


def quantize_params(
    family: Family,
    config: Config,
    recipe: Recipe,
    params: Mapping[str, Any],
    batches: Batches | None = None,
    progress: Progress = no_progress,
) -> tuple[Params, dict[str, Any]]:
    """Quantise a float model in memory; see :class:`Conversion`.

    Returns:
        Tensors by name (``QWeight`` where quantised, with ``act_scale`` tables), and a report with
        weight error per layer and clipping per quantisation point, see docs/checkpoints.md.
    """
    made: Params = {}

    def keep(part: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        made.update({name: in_memory(value) for name, value in tensors.items()})
        return {}

    job = Conversion(family, config, recipe, params, batches, progress=progress)
    report = job.run(keep)
    if recipe.learns_whole:
        learned, report["tuning"] = job.learned(made)
        made.update(learned)
    job.states.close()
    return {name: made[name] for name in abstract_params(job.target)}, report


def in_memory(value: Any) -> Any:
    """A tensor whole."""
    if not isinstance(value, Rows):
        return value
    blocks = list(value.blocks)
    return jax.tree.map(lambda *b: np.concatenate(b), *blocks)


class Conversion:
    """Quantises one model as a recipe says.

    Args:
        params: float tensors by name, layers separate; for a rotation of an :func:`untied` model.
        batches: calibration prompts with their answers, in chunks that run at a time; needed when
            some activation is static or the weights are rounded by GPTQ.
        states, ledger: where an interrupted conversion finds what it had finished.

    Attributes:
        target: the abstract quantised model.
        report: weight error per layer, clipping per quantisation point, decisions.

    Raises:
        UserError: a recipe that needs calibration data without any, or data without pictures.
    """

    def __init__(
        self,
        family: Family,
        config: Config,
        recipe: Recipe,
        params: Mapping[str, Any],
        batches: Batches | None = None,
        *,
        states: States | None = None,
        ledger: Ledger | None = None,
        progress: Progress = no_progress,
    ):
        if recipe.needs_calibration and batches is None:
            raise UserError(
                f"recipe {recipe.name!r} needs calibration data: pass --calibration FILE.jsonl"
            )
        self.family, self.config, self.recipe = family, config, recipe
        self.batches = [batches] if isinstance(batches, Batch) else list(batches or ())
        self.source: Tensors = lazy(params)
        self.params: Tensors = self.source
        self.states, self.ledger = states or States(), ledger or Ledger()
        self.progress = progress
        self.target = abstract_model(family, config, recipe)
        self._shapes = abstract_params(self.target)
        self._written: set[str] = set()
        self._bar: Iterator[Any] = iter(())
        self._unchanged: Statistics | None = None  # a look before anything was scaled or rotated
        self.report: dict[str, Any] = {"weights": {}, "points": {}}

    def run(self, sink: Sink) -> dict[str, Any]:
        """Make every tensor and hand it, part by part, to ``sink``; returns the report."""
        self._bar = iter(self.progress(range(self._visits()), "convert"))
        self._prepare()
        if self.recipe.needs_calibration:
            self._calibrate(sink)
        self._rest(sink)
        for (
            _
        ) in self._bar:  # parts that calibration did not reach, such as the tower without pictures
            pass
        return self.report

    def measure(self, visitor: Visitor) -> None:
        """Take a visitor through the float model as it is before rounding: balanced, rotated."""
        inner = [p for p in by_part(self._shapes) if p not in OUTSIDE]
        visits = (1 + self.recipe.balance) * len(inner)
        self._bar = iter(self.progress(range(visits), "measure"))
        self._prepare()
        self.walk("measure", without_prefix(self.recipe), visitor)

    def _prepare(self) -> None:
        """Balance and rotate, as views."""
        recipe, streams = self.recipe, self.family.streams
        if recipe.balance:
            look = Statistics(columns=True, sample=0)
            self.walk("balance", Recipe(), look)
            self._unchanged = look
            self.params, self.report["balance"] = balance_params(
                self.params, streams(self.config), look
            )
        if recipe.rotate:
            self.params = rotate_params(
                self.params,
                streams(self.config),
                recipe.seed,
                recipe.online_signs,
                recipe.orthogonal,
                recipe.online_reads,
            )

    def _visits(self) -> int:
        """How many parts are visited, once per pass over the model."""
        parts, recipe = by_part(self._shapes), self.recipe
        inner = [p for p in parts if p not in OUTSIDE]
        walks = recipe.balance + recipe.smooth + recipe.finds_sinks + recipe.needs_calibration
        return walks * len(inner) + len(parts) - (len(inner) if walks else 0)

    def walk(
        self,
        name: str,
        recipe: Recipe,
        visitor: Visitor,
        twin: bool = False,
        rounded: RowChange | None = None,
    ) -> None:
        """Take a visitor through the float model that ``recipe`` describes, part by part.

        Args:
            name: of the pass, in the journal and in the timing.
            twin: carry the unquantised stream along as well.
            rounded: replaces rows of the embedding where it is quantised.
        """
        model = abstract_float(self.family, self.config, recipe)
        params = of_recipe(recipe, self.params)
        with stage(name):
            Walk(
                name, model, params, self.batches, self.states, self.ledger, twin=twin,
                rounded=rounded, advance=lambda: next(self._bar, None),
            ).run(visitor)  # fmt: skip

    def _calibrate(self, sink: Sink) -> None:
        """Determine everything that depends on the calibration prompts."""
        recipe, bare = self.recipe, without_prefix(self.recipe)
        sinks: tuple[list[int], list[int]] = [], []
        if recipe.smooth:
            look = Statistics(columns=True)
            self.walk("smooth", bare, look)
            if not (recipe.balance or recipe.rotate):
                self._unchanged = look
            streams = self.family.streams(self.config)
            self.params, self.report["smoothing"] = smooth_params(
                self.params, streams, recipe, look
            )
        if recipe.finds_sinks:
            look = Statistics(columns=False)
            self.walk("sinks", bare, look)
            sinks = sinks_of(look, self.batches)
            self._mark_sinks(sinks)
        self.report["coverage"] = coverage(self.batches, sinks)
        if self._unchanged is not None:
            self.report["before"] = float_ranges(self._unchanged, self.batches, sinks)
            self._unchanged = None  # of no more use, and as large as the prompts are long
        dtypes = {name: value.dtype for name, value in self.source.items()}
        quantiser = Quantiser(self.target, recipe, dtypes, self.states, sink)
        rounded = self._rounded_rows if self._table.quantised else None
        self.walk("round", recipe, quantiser, recipe.carries_float, rounded)
        self._written |= quantiser.written
        self.report |= {k: v for k, v in quantiser.report.items() if v or k in self.report}

    def _mark_sinks(self, found: tuple[list[int], list[int]]) -> None:
        recipe, made = self.recipe, {}
        self.report["sinks"] = dict(zip(("positions", "ids"), found, strict=True))
        if recipe.marks_sinks:
            made = sink_rule(*found)
        if recipe.prefix_sinks:
            ids = prefix_ids(*found, self.batches, recipe.prefix_sinks)
            self.report["prefix"] = ids
            model = abstract_float(self.family, self.config, without_prefix(recipe))
            params = of_recipe(without_prefix(recipe), self.params)
            made |= prefix_params(model, params, ids, self.states)
        self.params = {**self.params, **lazy(made)}

    def _rest(self, sink: Sink) -> None:
        """The tensors that no walk has made: large tables, and all, where nothing is calibrated."""
        left = [n for n in abstract_params(self.target) if n not in self._written]
        for part, names in by_part(dict.fromkeys(left)).items():
            key = f"rest/{part}"
            record = self.ledger.done(key)
            if record is None:
                errors: dict[str, float] = {}
                record = sink(part, {name: self._made(name, errors) for name in names})
                record["report"] = {"weights": errors}
                self.ledger.commit(key, record)
            self.report["weights"].update(record["report"]["weights"])
            next(self._bar, None)

    def _made(self, name: str, errors: dict[str, float]) -> Any:
        """A tensor as the checkpoint holds it, block by block of rows; ``errors`` gets a rounded
        one's relative error once all blocks are taken."""
        like, tensor = self._shapes[name], self.params[name]
        if isinstance(like, QWeight):
            s = self._section(name)
            blocks = self._rounded(name, tensor, s, errors)
            return Rows(tensor.shape, blocks, bits=s.w_bits, groups=like.groups)
        tensor = tensor.astype(self.source.get(name, tensor).dtype)
        return Rows(tensor.shape, tensor.blocks(), tensor.dtype) if tensor.ndim else tensor.load()

    @property
    def _table(self) -> Section:
        """How the token embedding is quantised."""
        return self._section("language/embedding")

    def _section(self, name: str) -> Section:
        """How a rounded tensor is quantised."""
        path = layer_path(name, self.config.language.tied_head)
        assert path is not None, f"{name} is no weight of a dense layer"
        return self.recipe.section_for(path)

    def _rounded_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the token embedding as the quantised model looks them up."""
        s = self._table
        q = round_weight(rows, s.w_bits, s.group_size, self.recipe.weights.clip)
        return np.asarray(q.dequantize())

    def _rounded(
        self, name: str, tensor: Lazy, section: Section, errors: dict[str, float]
    ) -> Iterator[QWeight]:
        lost = whole = 0.0
        for block in tensor.blocks():
            clip = self.recipe.weights.clip
            q = round_weight(block, section.w_bits, section.group_size, clip)
            w = np.asarray(block, np.float32)
            lost += float(np.sum((w - np.asarray(q.dequantize())) ** 2, dtype=np.float64))
            whole += float(np.sum(w**2, dtype=np.float64))
            yield q
        errors[name] = (lost / (whole + 1e-60)) ** 0.5

    def learned(self, made: Params) -> tuple[Params, dict[str, float]]:
        """Learn the scales of the quantised model ``made``, whole, beside the float model.

        Returns:
            The tensors that changed, and what the divergence was before and after.
        """
        set_params(self.target, dict(made), in_float32)
        teacher = float_model(self.family, self.config, without_prefix(self.recipe), self.params)
        values, report = tune(self.target, teacher, self.batches, self.recipe.tune, self.progress)
        return {name: placed(made[name], value) for name, value in values.items()}, report


def sinks_of(look: Statistics, batches: Sequence[Batch]) -> tuple[list[int], list[int]]:
    """Positions and ids of the sinks that a look at the language model showed."""
    tokens = {k: v for k, v in look.tokens.items() if k.startswith("language/layers/")}
    ids, order, classes = flat(batches)
    return find_sinks(tokens, ids, order, classes, SinkRule.POSITIONS, SinkRule.IDS)


def sink_rule(positions: list[int], ids: list[int]) -> Params:
    """The tensors of a :class:`SinkRule`."""

    def padded(values: list[int], size: int) -> np.ndarray:
        return np.asarray([*values, *[-1] * (size - len(values))], np.int32)

    return {
        "language/sinks/positions": padded(positions, SinkRule.POSITIONS),
        "language/sinks/ids": padded(ids, SinkRule.IDS),
    }


def abstract_float(family: Family, config: Config, recipe: Recipe) -> VLM:
    """The structure of the unquantised model, rotated and with a prefix if the recipe says so."""
    kept = ("rotate", "orthogonal", "online_signs", "online_reads", "seed", "prefix_sinks")
    model = abstract_model(family, config, Recipe(**{k: getattr(recipe, k) for k in kept}))
    if recipe.marks_sinks:  # as in the quantised model: calibration distinguishes token classes
        model.language.sinks = nnx.eval_shape(SinkRule)
    return model


def float_model(family: Family, config: Config, recipe: Recipe, params: Mapping[str, Any]) -> VLM:
    """The unquantised model in float32, whole; ``params`` stays."""
    model = abstract_float(family, config, recipe)
    tensors = of_recipe(recipe, params)
    set_params(model, {name: np.asarray(working(v.load())) for name, v in tensors.items()})
    return model


def in_float32(value: Any, like: Any) -> Any:
    """A tensor of a checkpoint as an abstract float32 model holds it."""
    return value if is_weight(value) else np.asarray(value).astype(like.dtype)


def of_recipe(recipe: Recipe, params: Mapping[str, Any]) -> Tensors:
    """The tensors of :func:`abstract_float`; a rule for sinks is empty until they are found."""
    return lazy((sink_rule([], []) if recipe.marks_sinks else {}) | dict(params))


def without_prefix(recipe: Recipe) -> Recipe:
    """The recipe of a model that sees prompts alone."""
    return dataclasses.replace(recipe, prefix_sinks=0)


def untied(config: Config, params: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The same model with a head of its own.

    A rotation needs it: the final norm's weight goes into the head and not into the embedding.
    """
    if not config.language.tied_head:
        return config, dict(params)
    head = {"language/head/kernel": params["language/embedding"]}
    return with_head(config, tied=False), {**params, **head}
