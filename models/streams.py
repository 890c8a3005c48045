"""A family's declaration of its residual streams: writers, readers, and the norms between.

Fusing norms and rotating are loops over this declaration (:mod:`mquant_jax.ptq.rotate`).
Names are parameter paths without their last part; ``*`` stands for every layer number.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Read:
    """A norm and the dense layers that read its output.

    Attributes:
        norm: path of the norm; ``None``: the stream is read directly.
        readers: paths of the dense layers.
        blocks: number of adjacent positions concatenated for the readers (2x2 merges). The norm may
            come before or after the concatenation, depending on the size of its weight.
        centres: a LayerNorm on a stream that keeps its mean; rotated, a ``ProjectedNorm``.
    """

    norm: str | None
    readers: tuple[str, ...]
    blocks: int = 1
    centres: bool = False


@dataclasses.dataclass(frozen=True)
class Gain:
    """Layer scale: the output of a dense layer is multiplied by a factor per channel.

    Attributes:
        vector: full parameter name; a rotated model has no such parameter.
        writer: path of the dense layer, which absorbs it.
    """

    vector: str
    writer: str


@dataclasses.dataclass(frozen=True)
class Stream:
    """One residual stream.

    Attributes:
        name: for reports; also part of the seed of its rotation.
        width: channels.
        tables: tensors whose rows enter the stream (token embeddings, class token, positions),
            full parameter names. The output of an :class:`~mquant_jax.nn.vit.InputNorm` is not
            among them: it is rotated online.
        writers: dense layers whose outputs are added to it.
        reads: norms with their readers.
        gains: layer scales of the writers.
        centred: the norms are LayerNorms: the mean is removed from writers, and norms become
            RMSNorms.
    """

    name: str
    width: int
    writers: tuple[str, ...]
    reads: tuple[Read, ...]
    tables: tuple[str, ...] = ()
    gains: tuple[Gain, ...] = ()
    centred: bool = False


@dataclasses.dataclass(frozen=True)
class ValueOutput:
    """An attention's value and output projections, rotated head by head.

    Attributes:
        value, output: paths.
        head_dim: width of a head; all heads share the rotation, so grouped queries fit.
        twin: value and output of a second expert. One attention mixes the values of both, so they
            are rotated alike.
    """

    value: str
    output: str
    head_dim: int
    twin: tuple[str, str] | None = None

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Value projections with their output projections."""
        own = (self.value, self.output)
        return (own, self.twin) if self.twin else (own,)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A dense layer that follows an online rotation, usually an MLP's last.

    Attributes:
        reader: path of the layer.
        width: number of its inputs.
        reads_stream: its inputs are a residual stream that takes no rotation; the recipe then
            chooses whether there is an online rotation.
        sign_carrier: a layer that enters the hidden activation linearly (``up_proj`` of a gated
            MLP) and absorbs the rotation's signs; ``None``: the signs are applied online.
    """

    reader: str
    width: int
    sign_carrier: str | None = None
    reads_stream: bool = False


@dataclasses.dataclass(frozen=True)
class Streams:
    """Everything that rotation needs to know of a model."""

    streams: tuple[Stream, ...] = ()
    attentions: tuple[ValueOutput, ...] = ()
    hiddens: tuple[Hidden, ...] = ()

    def __add__(self, other: Streams) -> Streams:
        return Streams(
            self.streams + other.streams,
            self.attentions + other.attentions,
            self.hiddens + other.hiddens,
        )
