"""Data parallelism: each device runs its share of a batch with its own copy of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.act_quant import VISUAL
from mquant_jax.nn.vit import VisionInput
from mquant_jax.runtime import buckets, steps
from mquant_jax.runtime.generate import Generator
from mquant_jax.runtime.input_shapes import prompt_shapes, shape_of, vision_shapes
from mquant_jax.runtime.programs import PROGRAMS, Programs
from mquant_jax.runtime.prompts import padded
from mquant_jax.runtime.steps import Answers
from mquant_jax.runtime.tokens import arrange

AXIS = "data"
_FILL = {"order": -1, "token_class": -1, "visual_index": -1}


@dataclasses.dataclass(frozen=True)
class Shares:
    """A batch split into equal parts, one per device.

    Attributes:
        batch: the rows of all parts, padding rows last; ``visual_index`` indexes the features of
            the part's own pictures.
        vision: pictures in runs of equal length; a run has as many pictures for each part.
    """

    batch: Batch
    vision: list[VisionInput]


def cut(model: VLM, batch: Batch, parts: int, platform: str) -> Shares:
    """Split a batch, with its pictures, into parts whose number of rows is a power of two."""
    batch = padded(model, batch)
    rows = parts * buckets.rows(-(-batch.order.shape[0] // parts))
    vision, batch = batch.vision, _with_rows(dataclasses.replace(batch, vision=None), rows)
    if vision is None or not (batch.visual_index >= 0).any():
        return Shares(batch, [])
    picture, token = np.divmod(batch.visual_index, model.vision.tokens(vision.patches.shape[1]))
    picture = np.where(batch.visual_index < 0, -1, picture).reshape(parts, -1)
    used = [np.unique(part[part >= 0]) for part in picture]
    together = buckets.together(max(map(len, used)), vision.patches.shape[1], platform)
    place = np.stack([np.searchsorted(u, p) for u, p in zip(used, picture, strict=True)])
    index = place.reshape(token.shape) * model.vision.tokens(vision.patches.shape[1]) + token
    index = np.where(batch.visual_index < 0, -1, index).astype(np.int32)
    return Shares(
        dataclasses.replace(batch, visual_index=index), list(_runs(vision, used, together))
    )


def _runs(vision: VisionInput, used: list[np.ndarray], length: int) -> Iterator[VisionInput]:
    """The pictures of each part, ``length`` per part at a time, filled up with zeros."""
    for start in range(0, max(map(len, used)), length):
        rows = np.full((len(used), length), -1)
        for part, numbers in zip(rows, used, strict=True):
            some = numbers[start : start + length]
            part[: len(some)] = some
        yield jax.tree.map(lambda x: _taken(x, rows.ravel()), vision)  # noqa: B023


def _taken(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    out = x[rows]
    out[rows < 0] = 0
    return out


def _with_rows(batch: Batch, rows: int) -> Batch:
    """The batch with padding rows appended."""
    missing = rows - batch.order.shape[0]

    def fit(name: str, axis: int = 0) -> np.ndarray:
        x = np.asarray(getattr(batch, name))
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, missing)
        return np.pad(x, widths, constant_values=_FILL.get(name, 0))

    return dataclasses.replace(
        batch,
        input_ids=fit("input_ids"),
        order=fit("order"),
        positions=fit("positions", 1),
        token_class=fit("token_class"),
        visual_index=fit("visual_index"),
    )


class DataParallel(Generator):
    """A :class:`Generator` that shards batches over devices.

    The weights are replicated, and ``shard_map`` shards the rows of a batch. The programs contain
    no collectives, so no device waits for another before the end. All pictures of a batch are
    padded to one size, and so are all prompts. Answers equal those of :class:`Generator` up to
    rounding.

    Sizes depend on the batches, so :meth:`warm_up` compiles nothing.

    Args:
        devices: devices of this process.
    """

    def __init__(
        self,
        model: VLM,
        stop_ids: tuple[int, ...],
        layout: str = "auto",
        kv_cache: str = "float",
        programs: Programs = PROGRAMS,
        *,
        devices: Sequence[Any],
    ):
        super().__init__(model, stop_ids, layout, kv_cache, programs)
        self.cursors = False
        self.mesh = Mesh(np.asarray(devices), (AXIS,))
        self.params = self.put(self.params)

    def put(self, params: Any) -> Any:
        """The weights on every device."""
        return jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))

    def params_for(self, rows: int) -> Any:
        return self.params

    def start(self, batch: Batch, max_new_tokens: int) -> Answers:
        """Run the vision tower and the prefill; padding rows are done from the start."""
        shares = cut(self.model, batch, self.mesh.size, self.platform)
        prompts = shares.batch
        if self.aifs and prompts.visual_slots is None:
            prompts = _arranged(prompts)
        features = [
            self.program("see", *v.patches.shape[:2])(self.params, v) for v in shares.vision
        ]
        # Repeated features, which no token reads, bound the number of sizes.
        features += features[:1] * (buckets.rows(len(features)) - len(features) if features else 0)
        rows, width = prompts.order.shape
        slots = buckets.slots(width + max_new_tokens)
        shapes = tuple(f.shape for f in features)
        begin = self.program("begin", rows, width, slots, shapes, prompts.visual_slots)
        return begin(self.params, prompts, tuple(features))

    def _sizes(self, *args: int) -> Iterator[tuple]:
        return iter(())

    def _over_rows(
        self,
        step: Callable,
        arguments: Callable[[int], tuple],
        rows: int,
        donate: int | None = None,
    ) -> Any:
        """``step`` on the rows of each device.

        Arrays are sharded along the axis that grows with the number of rows. A scalar has one value
        per device, for example the fill level of its cache.
        """
        bound = self.bound(step)
        part, whole = arguments(rows // self.mesh.size), arguments(rows)
        results = [jax.eval_shape(bound, self.params, *a) for a in (part, whole)]
        cuts, result_cuts = (jax.tree.map(_cut, *pair) for pair in ((part, whole), results))

        def local(params: Any, *args: Any) -> Any:
            args = jax.tree.map(lambda x, like: x.reshape(like.shape), args, part)
            return jax.tree.map(jnp.atleast_1d, bound(params, *args))

        mapped = jax.shard_map(
            local, mesh=self.mesh, in_specs=(PartitionSpec(), *cuts), out_specs=result_cuts,
            check_vma=False,
        )  # fmt: skip
        shapes = jax.tree.map(self._placed, whole, cuts)
        donated = () if donate is None else (donate,)
        return jax.jit(mapped, donate_argnums=donated).lower(self.params, *shapes).compile()

    def _placed(self, x: Any, spec: PartitionSpec) -> Any:
        shape = x.shape or (self.mesh.size,)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

    def _compile_see(self, rows: int, patches: int) -> Any:
        def see(model: VLM, vision: VisionInput) -> jax.Array:
            return model.vision(vision).astype(model.language.dtype)

        return self._over_rows(see, lambda n: (vision_shapes(self.model, n, patches),), rows)

    def _compile_begin(
        self, rows: int, width: int, slots: int, features: tuple, visual_slots: int | None
    ) -> Any:
        dtype = self.model.language.dtype

        def arguments(n: int) -> tuple:
            found = [(s[0] * n // rows, *s[1:]) for s in features]
            held = tuple(shape_of(shape, dtype) for shape in found)
            return prompt_shapes(self.model, n, width, visual_slots), held

        def begin(model: VLM, batch: Batch, features: tuple) -> Answers:
            flat = [f.reshape(-1, f.shape[-1]) for f in features]
            visual = jnp.concatenate(flat) if flat else None
            return steps.begin(model, batch, slots, self.int8_cache, visual)

        return self._over_rows(begin, arguments, rows)


def _cut(part: Any, whole: Any) -> PartitionSpec:
    """The spec that shards an array along the axis in which ``part`` and ``whole`` differ."""
    grown = [small != large for small, large in zip(part.shape, whole.shape, strict=True)]
    return PartitionSpec(*(AXIS if g else None for g in grown)) if part.shape else _PER_DEVICE


_PER_DEVICE = PartitionSpec(AXIS)


def _arranged(batch: Batch) -> Batch:
    """The batch in AIFS layout, both slices padded to compiled sizes."""
    real = batch.order >= 0
    visual = (real & (batch.token_class == VISUAL)).sum(axis=1)
    most, text = int(visual.max()), int((real.sum(axis=1) - visual).max())
    front = buckets.prompt(most) if most else 0
    return arrange(batch, front, buckets.prompt(text))[0]
