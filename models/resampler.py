"""Shared by families' resamplers: published tensor names and streams."""

from __future__ import annotations

from collections.abc import Iterator

from mquant_jax.errors import UserError
from mquant_jax.models.language import dense_rules, direct, norm_rules
from mquant_jax.models.rules import Rows, WeightRule
from mquant_jax.models.streams import Hidden, Read, Stream, Streams, ValueOutput
from mquant_jax.nn.resampler import ResamplerConfig


def resampler_rules(c: ResamplerConfig, src: str, last: str) -> Iterator[WeightRule]:
    """Yield the rules of a resampler under ``src``, its last norm and projection under ``last``."""
    d = c.width
    yield direct("vision/query", f"{src}.query", c.queries, d)
    if c.stored_positions:
        for part in ("keys", "queries"):
            yield direct(f"vision/{part}/positions", f"{src}.pos_embed", c.queries, d)
    if c.projects:
        yield from dense_rules("vision/keys/kv_proj", f"{src}.kv_proj", d, c.features, bias=False)
    projections = ("vision/queries/q_proj", "vision/keys/k_proj", "vision/keys/v_proj")
    for leaf, hf, tail in (("kernel", "weight", (d,)), ("bias", "bias", ())):
        for i, dst in enumerate(projections):
            yield WeightRule(f"{dst}/{leaf}", f"{src}.attn.in_proj_{hf}", (d, *tail),
                             (3 * d, *tail), Rows(i, i + 1, 3))  # fmt: skip
    yield from dense_rules("vision/merger/out_proj", f"{src}.attn.out_proj", d, d)
    yield from norm_rules("vision/queries/norm", f"{src}.ln_q", d)
    yield from norm_rules("vision/keys/norm", f"{src}.ln_kv", d)
    yield from norm_rules("vision/merger/norm", f"{last}.ln_post", d)
    # A plain parameter, multiplied from the right.
    yield WeightRule("vision/merger/proj/kernel", f"{last}.proj", (d, d), (d, d), transposed=True)


def resampler_streams(c: ResamplerConfig) -> Streams:
    """Return the streams inside a resampler that end in a norm, its attention, and the layers that
    follow online rotations.

    A resampler has no residual stream, so its queries and its output have their own bases (as in
    the paper's code). Inputs of its keys and values, and of queries with positions, are rotated
    online, because the positions come between their norm and their reader.

    Raises:
        UserError: the resampler does not project the tower's features.
    """
    if not c.projects:
        raise UserError(
            f"the tower is as wide as the decoder ({c.width}): the resampler has no kv_proj, which "
            "rotation and quantisation need; use recipe float (no released model is like this)"
        )
    query = "vision/queries/q_proj"
    queries = Stream(
        "queries",
        c.width,
        tables=("vision/query",),
        writers=(),
        reads=(Read("vision/queries/norm", (query,)),),
        centred=True,
    )
    resampled = Stream(
        "resampled",
        c.width,
        writers=("vision/merger/out_proj",),
        reads=(Read("vision/merger/norm", ("vision/merger/proj",)),),
        centred=True,
    )
    placed = ("vision/keys/k_proj", "vision/keys/v_proj", *(query,) * c.stored_positions)
    return Streams(
        (resampled,) if c.stored_positions else (queries, resampled),
        (ValueOutput("vision/keys/v_proj", "vision/merger/out_proj", c.width // c.heads),),
        tuple(Hidden(reader, c.width) for reader in placed),
    )
