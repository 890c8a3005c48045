"""Streams of towers and decoders, derived from what the parts of their blocks state."""

from __future__ import annotations

import dataclasses

from mquant_jax.models.streams import Gain, Hidden, Read, Stream, Streams, ValueOutput
from mquant_jax.nn.decoder_block import DecoderBlock, DecoderConfig
from mquant_jax.nn.vit import STREAM
from mquant_jax.nn.vit_block import ViTBlock, ViTConfig

_HALVES = ("attn", "mlp")


@dataclasses.dataclass(frozen=True)
class Layers:
    """The dense layers of a stack, by the points of its blocks; of all experts, if there are."""

    path: str
    block: type[ViTBlock | DecoderBlock]

    def at(self, point: str) -> tuple[str, ...]:
        """Paths of the layers that read what passes a point."""
        found = (n for at, n in self.block.POINTS.items() if at.rpartition("/")[2] == point)
        return tuple(f"{self.path}/{name}" for names in found for name in names)

    @property
    def writers(self) -> tuple[str, ...]:
        """The layers that write to the stream."""
        return (*self.at("attn_out"), *self.at("mlp_hidden"))

    def reads(self, centres: bool = False) -> tuple[Read, ...]:
        """Norms with their readers."""
        return tuple(
            Read(f"{self.path}/{half}_norm", self.at(f"{half}_in"), centres=centres)
            for half in _HALVES
        )

    def attention(self, head_dim: int) -> ValueOutput:
        """Values and output projections."""
        values = [path for path in self.at("attn_in") if path.endswith("/v_proj")]
        own, *twin = zip(values, self.at("attn_out"), strict=True)
        return ValueOutput(*own, head_dim, *twin)

    def hiddens(self, inner: int) -> tuple[Hidden, ...]:
        """The MLPs' last layers."""
        signs, last = self.block.SIGNS, self.at("mlp_hidden")
        return tuple(
            Hidden(path, inner, signs and f"{path.rpartition('/')[0]}/{signs}") for path in last
        )


def tower_streams(c: ViTConfig, *reads: Read) -> Streams:
    """Return the declaration of a tower without its connector.

    Args:
        reads: the connector's, of the tower's stream.
    """
    layers = Layers("vision/layers/*", c.block)
    attentions, hiddens = (layers.attention(c.head_dim),), layers.hiddens(c.intermediate_size)
    if not c.block.FUSES_NORMS:
        read = (*layers.at("attn_in"), *layers.at("mlp_in"))
        online = (Hidden(path, c.hidden_size, reads_stream=True) for path in read)
        return Streams((), attentions, (*online, *hiddens))
    tables = ("vision/class_token",) * c.class_token + ("vision/positions",) * bool(c.positions)
    gains = zip((f"{layers.path}/{half}_gain" for half in _HALVES), layers.writers, strict=True)
    stream = Stream(
        STREAM,
        c.hidden_size,
        # An input norm is rotated online; tables and patches come before it.
        tables=() if c.input_norm else tables,
        writers=("vision/patch_embed/proj",) * (not c.input_norm) + layers.writers,
        gains=tuple(Gain(*gain) for gain in gains) if c.layer_scale else (),
        reads=(*layers.reads(centres=c.keeps_mean and not c.rms_norm), *reads),
        centred=not (c.keeps_mean or c.rms_norm),
    )
    return Streams((stream,), attentions, hiddens)


def decoder_streams(c: DecoderConfig, *writers: str, tables: tuple[str, ...] = ()) -> Streams:
    """Return the declaration of a decoder; ``writers`` and ``tables`` add visual tokens."""
    layers = Layers("language/layers/*", c.block)
    stream = Stream(
        "language",
        c.hidden_size,
        tables=(*tables, "language/embedding"),
        writers=(*writers, *layers.writers),
        reads=(*layers.reads(), Read("language/norm", ("language/head",))),
    )
    return Streams((stream,), (layers.attention(c.head_dim),), layers.hiddens(c.intermediate_size))
