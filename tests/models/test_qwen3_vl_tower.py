"""Qwen3-VL's interpolated positions and taps against plain NumPy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.models.qwen2_vl.processing import pack_vision
from mquant_jax.models.qwen3_vl import FAMILY
from mquant_jax.nn.flow import run
from mquant_jax.nn.positions import StretchedTable
from mquant_jax.nn.resample import bilinear_cells
from mquant_jax.nn.rope import chunked, interleaved
from mquant_jax.nn.stack import scan_blocks, scan_tapped
from mquant_jax.nn.vit_block import VisionContext
from mquant_jax.ptq.tune import Recomputing
from tests.family_cases import changed_config, family_of, model_of, random_params
from tests.helpers import relative

CASE = "qwen3_vl/public"
GRIDS = [(1, 18, 12), (2, 6, 8), (1, 2, 22), (1, 2, 2)]


def stretched(table: np.ndarray, h: int, w: int) -> np.ndarray:
    """Interpolate a table ``[side, side, d]`` to an ``h x w`` grid with aligned corners."""
    side = len(table)

    def weights(new: int) -> np.ndarray:
        at = np.arange(new) * (side - 1) / max(new - 1, 1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(side)))  # triangular kernel

    return np.einsum("ai,bj,ijd->abd", weights(h), weights(w), table)


@pytest.mark.parametrize("side", [1, 4, 6, 48])
def test_positions_are_stretched_over_each_picture(side) -> None:
    table = np.random.default_rng(side).normal(size=(side, side, 3)).astype(np.float32)
    grids = [*GRIDS, (1, 1, 7), (1, 96, 4), (1, 48, 48)]
    merge = 1  # patches in raster order, for any numbers of rows and columns
    size = sum(t * h * w for t, h, w in grids)
    vision = pack_vision(np.zeros((size, 3), np.float32), grids, merge)
    flat = jnp.asarray(table.reshape(-1, 3))
    got = StretchedTable(side).at(flat, vision.patches.shape[1], vision.coords, None)
    frames = [(h, w) for t, h, w in grids for _ in range(t)]
    for row, (h, w) in enumerate(frames):
        expected = stretched(table.astype(np.float64), h, w).reshape(-1, 3)
        np.testing.assert_allclose(got[row, : h * w], expected, atol=1e-6)
        if (h, w) == (side, side):
            np.testing.assert_array_equal(got[row, : h * w], flat)


def test_cells_are_inside_and_weights_add_up() -> None:
    for n in (1, 2, 6, 7, 8, 99):
        coords = np.stack([np.arange(n), np.arange(n)[::-1]], -1)[None].astype(np.int32)
        cells, weights = map(np.asarray, bilinear_cells(coords, 7))
        assert cells.min() >= 0 and cells.max() < 49 and weights.min() >= 0
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_slots_of_rotary_positions() -> None:
    """The original assigns stream 0 to all slots, then others to every third slot below 3 n."""
    for sections in ((24, 20, 20), (6, 5, 5), (4, 4, 4), (2, 1, 1), (1, 6, 1), (3, 2, 7)):
        expected = np.zeros(sum(sections), int)
        for stream in (1, 2):
            expected[stream : 3 * sections[stream] : 3] = stream
        assert interleaved(sections) == tuple(expected)
    assert interleaved((24, 20, 20))[57:] == (0, 1, 2, 0, 0, 0, 0)
    assert chunked((2, 3, 1)) == (0, 0, 1, 1, 1, 2)


@pytest.fixture(scope="module")
def made():
    changes = {"depth": 4, "deepstack_visual_indexes": [0, 2, 3]}
    _, config = family_of(changed_config(CASE, vision_config=changes))
    params = random_params(FAMILY, config, 3)
    patches = np.random.default_rng(0).standard_normal(
        (sum(t * h * w for t, h, w in GRIDS), config.vision.patch_dim)
    )
    vision = pack_vision(patches.astype(np.float32), GRIDS, config.merge_size)
    return config, model_of(FAMILY, config, params), vision


@pytest.mark.parametrize("taps", [(), (1,), (3,), (0, 2, 3), (0, 1, 2, 3)])
def test_taps_are_outputs_of_their_layers(made, taps) -> None:
    config, model, vision = made
    shape, stack = (*vision.valid.shape, config.vision.hidden_size), model.vision.layers
    x = jax.random.normal(jax.random.key(1), shape)
    context, real = VisionContext(None, vision.token_class), np.asarray(vision.valid)
    every = [scan_blocks(_first(stack, i + 1), x, context) for i in range(4)]
    for loop in (scan_tapped, partial(Recomputing().tapped, "vision/layers")):
        last, tapped = loop(stack, x, context, taps)
        assert len(tapped) == len(taps) and relative(last[real], every[3][real]) < 1e-6
        for i, tap in zip(taps, tapped, strict=True):
            assert relative(tap[real], every[i][real]) < 1e-6


def _first(stack, count: int):
    """The first blocks of a stack."""
    return jax.tree.map(lambda x: x[:count], stack)


def test_one_scan_whatever_is_tapped(made) -> None:
    _, model, vision = made
    text = str(jax.make_jaxpr(lambda v: model.vision(v))(vision))
    assert text.count("scan[") == 1


def test_a_vision_module_joins_its_parts(made) -> None:
    config, model, vision = made
    parts = run(model.vision.flow(vision))
    assert len(parts) == 4 and model.feature_width == 4 * config.language.hidden_size
    joined = np.asarray(model.vision(vision))
    np.testing.assert_allclose(joined, np.concatenate(parts, axis=-1), rtol=1e-6, atol=1e-6)
    for part, again in zip(parts, model.parts(joined), strict=True):
        np.testing.assert_allclose(part, again, rtol=1e-6, atol=1e-6)
