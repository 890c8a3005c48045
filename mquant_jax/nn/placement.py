"""How one part of a model is quantised and computed: what its blocks are built from.

Dense layers and quantisation points are made here, so that the recipe's rules reach all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.hadamard import Orthogonal, Rotation, plan_rotation, stream_rotation
from mquant_jax.nn.act_quant import ActQuant, Points
from mquant_jax.nn.dense import WHOLE, Dense
from mquant_jax.nn.stack import Segments, stack_layers
from mquant_jax.recipe import Recipe, Section, Split


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one part of a model is quantised and computed.

    Attributes:
        path: of the part in the model; of a run of equal layers, that of its first.
        recipe: says how each layer is quantised.
        n_classes: entries in each static scale table.
        dtype: float type of everything that is not integer.
        rotated: norms and rotations have been folded into the weights.
        rotates_reads: streams that take no rotation are rotated online where they are read.
        rotation_seed: seed of the online rotations' signs; ``None``: they have none.
        sink_class: the model knows which tokens are sinks.
        prefix: tokens before every prompt, whose keys and values are parameters.
        split: whether MLPs' last layers have a split-off input channel.
        seed: of the streams' rotations.
        orthogonal: those are random orthogonal matrices.
    """

    path: str
    recipe: Recipe = Recipe()
    n_classes: int = 1
    dtype: Any = jnp.float32
    rotated: bool = False
    rotates_reads: bool = False
    rotation_seed: int | None = None
    sink_class: bool = False
    prefix: int = 0
    split: Split = Split()
    seed: int = 0
    orthogonal: bool = False

    @classmethod
    def of(cls, recipe: Recipe, path: str, dtype: Any) -> Placement:
        """The placement of a part of the model, ``vision/merger``; ``language`` alone has token
        classes."""
        language = path == "language"
        return cls(
            path,
            recipe,
            n_classes=recipe.n_classes if language else 1,
            dtype=dtype,
            rotated=recipe.rotate,
            rotates_reads=recipe.rotate and recipe.online_reads,
            rotation_seed=recipe.online_seed,
            sink_class=recipe.marks_sinks and language,
            prefix=recipe.prefix_sinks if language else 0,
            split=recipe.split,
            seed=recipe.seed,
            orthogonal=recipe.orthogonal,
        )

    def within(self, name: str) -> Placement:
        """The placement of a module inside the part."""
        return dataclasses.replace(self, path=f"{self.path}/{name}")

    def stack(
        self,
        name: str,
        count: int,
        make_block: Callable[[Placement, nnx.Rngs], nnx.Module],
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """The ``count`` layers that the part has as ``name``.

        Returns:
            One stack; if rules make layers differ, :class:`~mquant_jax.nn.stack.Segments`.
        """
        runs = self._runs(name, count, make_block)
        stacks = {
            first: stack_layers(partial(make_block, self.within(f"{name}/{first}")), length, rngs)
            for first, length in runs
        }
        return stacks[0] if len(stacks) == 1 else Segments(stacks)

    def _runs(self, name: str, count: int, make_block: Callable) -> list[tuple[int, int]]:
        """First number and length of each run of layers that are quantised alike."""
        if not self.recipe.rules:
            return [(0, count)]
        block = nnx.eval_shape(lambda: make_block(self.within(f"{name}/0"), nnx.Rngs(0)))
        dense = [path for path, m in nnx.iter_modules(block) if isinstance(m, Dense)]
        names = ["/".join(map(str, path)) for path in dense]
        made = [[self.section(f"{name}/{i}/{layer}") for layer in names] for i in range(count)]
        starts = [i for i in range(count) if i == 0 or made[i] != made[i - 1]]
        ends = [*starts[1:], count]
        return [(first, end - first) for first, end in zip(starts, ends, strict=True)]

    def section(self, name: str) -> Section:
        """How a dense layer of the part is quantised."""
        return self.recipe.section_for(f"{self.path}/{name}")

    def dense(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        split: Split = WHOLE,
        rngs: nnx.Rngs,
    ) -> Dense:
        """The dense layer that the part has as ``name``."""
        return Dense(
            in_features, out_features, bias=bias, section=self.section(name), split=split,
            dtype=self.dtype, rngs=rngs,
        )  # fmt: skip

    def point(
        self,
        name: str,
        points: Points,
        rotation: Rotation | None = None,
        prefix: str = "",
    ) -> ActQuant:
        """A quantisation point of the part.

        Args:
            points: which dense layers of the part read it.
            prefix: stands in front of the point's name.

        Raises:
            UserError: rules that give the readers of one input different activation modes.
        """
        readers = points[name]
        modes = {reader: self.section(reader).mode(name) for reader in readers}
        if len(set(modes.values())) > 1:
            found = ", ".join(f"{reader} {mode}" for reader, mode in modes.items())
            raise UserError(
                f"recipe: rules give the layers that read {self.path}/{name} different activations "
                f"({found}); they read the same input, so name all of them in one rule"
            )
        return ActQuant(prefix + name, self.section(readers[0]), self.n_classes, rotation)

    def online_rotation(self, width: int) -> Rotation | None:
        """The rotation before an MLP's last layer; it may pad that layer's inputs."""
        return plan_rotation(width, self.rotation_seed, may_pad=True) if self.rotated else None

    def read_rotation(self, width: int) -> Rotation | None:
        """The rotation before layers that read a stream without a rotation of its own."""
        return self.online_rotation(width) if self.rotates_reads else None

    def entry_rotation(self, stream: str, width: int) -> Rotation | Orthogonal | None:
        """The rotation of a stream, applied online to inputs that no weight writes."""
        if not self.rotated:
            return None
        return stream_rotation(width, self.seed, stream, self.orthogonal)
