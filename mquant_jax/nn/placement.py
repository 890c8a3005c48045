"""How one part of a model is quantised and computed: what its blocks are built from."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from mquant_jax.hadamard import Orthogonal, Rotation, plan_rotation, stream_rotation
from mquant_jax.nn.dense import FLOAT
from mquant_jax.recipe import Recipe, Section, Split


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one part of a model is quantised and computed.

    Attributes:
        section: bits and activation mode.
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

    section: Section = FLOAT
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
    def of(cls, recipe: Recipe, section: str, dtype) -> Placement:
        """The placement of one of the recipe's sections; ``language`` alone has token classes."""
        language = section == "language"
        return cls(
            section=recipe.section(section),
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
