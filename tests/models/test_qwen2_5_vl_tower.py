"""The windowed tower against the family's description in plain NumPy, float64.

The goldens only have small pictures, which never reach the CPU's row-wise attention.
"""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from flax import nnx

from mquant_jax.models.qwen2_5_vl import FAMILY
from mquant_jax.models.qwen2_vl.processing import pack_vision
from mquant_jax.nn.stack import scan_blocks
from mquant_jax.nn.vit_block import VisionContext
from mquant_jax.nn.windows import Windows
from mquant_jax.ptq.tune import Recomputing
from tests.family_cases import changed_config, family_of, model_of, random_params
from tests.helpers import relative

CASE = "qwen2_5_vl/public"
GRIDS = [(1, 18, 12), (2, 6, 8), (1, 2, 22), (1, 16, 8)]  # ragged and exact windows of 8 patches
erf = np.vectorize(math.erf)


def window_index(h: int, w: int, side: int) -> list[list[int]]:
    """Indices of the merged tokens of an ``h x w`` grid, window by window."""
    return [
        [
            r * w + c
            for r in range(top, min(top + side, h))
            for c in range(left, min(left + side, w))
        ]
        for top in range(0, h, side)
        for left in range(0, w, side)
    ]


def rms(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def turned(x, angles):
    """Apply half-split rope to ``x [P, heads, d]``."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def tower(patches, h, w, p, config):
    """A frame's patches ``[h * w, 1176]`` in merge-block order -> visual tokens in raster order."""
    v, merge = config.vision, config.merge_size
    heads, d = v.num_heads, v.head_dim

    def dense(x, name):
        return x @ p[f"{name}/kernel"].T + p.get(f"{name}/bias", 0)

    place = [
        (r + dr, c + dc)
        for r in range(0, h, merge) for c in range(0, w, merge)
        for dr in range(merge) for dc in range(merge)
    ]  # fmt: skip
    slots = 10000.0 ** (-2 * np.arange(d // 4) / (d / 2))
    angles = np.array([[*(r * slots), *(c * slots)] for r, c in place])
    windows = window_index(h // merge, w // merge, v.window // merge)
    order = [t for window in windows for t in window]
    rows = (np.array(order)[:, None] * merge**2 + np.arange(merge**2)).ravel()
    x, angles = dense(patches, "vision/patch_embed/proj")[rows], angles[rows]
    ends = np.cumsum([len(window) * merge**2 for window in windows])
    for i in range(v.num_layers):
        at = f"vision/layers/{i}"
        y = rms(x, p[f"{at}/attn_norm/weight"])
        q, k, value = (dense(y, f"{at}/{n}_proj").reshape(-1, heads, d) for n in ("q", "k", "v"))
        q, k, out = turned(q, angles), turned(k, angles), np.zeros_like(q)
        cuts = [len(x)] if i in v.full_layers else ends
        for first, last in zip([0, *cuts[:-1]], cuts, strict=True):
            scores = np.einsum("qhd,khd->hqk", q[first:last], k[first:last]) * d**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[first:last] = np.einsum("hqk,khd->qhd", weights, value[first:last])
        x = x + dense(out.reshape(len(x), -1), f"{at}/o_proj")
        y = rms(x, p[f"{at}/mlp_norm/weight"])
        gate = dense(y, f"{at}/gate_proj")
        hidden = gate / (1 + np.exp(-gate)) * dense(y, f"{at}/up_proj")
        x = x + dense(hidden, f"{at}/down_proj")
    x = rms(x, p["vision/merger/norm/weight"]).reshape(len(order), -1)
    x = dense(x, "vision/merger/fc1")
    x = dense(0.5 * x * (1 + erf(x / math.sqrt(2))), "vision/merger/fc2")
    return x[np.argsort(order)]


def layers(depth: int, full: tuple[int, ...]):
    """Config, tensors and model with the published window size."""
    changes = {"depth": depth, "fullatt_block_indexes": list(full), "window_size": 112}
    _, config = family_of(changed_config(CASE, vision_config=changes))
    params = random_params(FAMILY, config, 3)
    return config, params, model_of(FAMILY, config, params)


@pytest.fixture(scope="module", params=[(1,), (0, 3), ()], ids=str)
def made(request):
    return layers(4, request.param)


def pictures(config):
    rng = np.random.default_rng(0)
    size = sum(t * h * w for t, h, w in GRIDS)
    return rng.standard_normal((size, config.vision.patch_dim)).astype(np.float32)


def test_pictures_of_many_sizes_and_a_clip(made) -> None:
    config, params, model = made
    patches, merge = pictures(config), config.merge_size
    vision = pack_vision(patches, GRIDS, merge)
    got = np.asarray(nnx.jit(lambda m, v: m.vision(v))(model, vision))
    exact = {name: np.asarray(value, np.float64) for name, value in params.items()}
    frames = [(h, w) for t, h, w in GRIDS for _ in range(t)]
    starts = np.cumsum([0, *[h * w for h, w in frames]])
    for row, (h, w) in enumerate(frames):
        own = patches[starts[row] : starts[row + 1]].astype(np.float64)
        expected = tower(own, h, w, exact, config)
        assert relative(got[row, : len(expected)], expected) < 1e-5


def sorted_by_window(config, vision) -> tuple[Windows, VisionContext]:
    full = np.array([i in config.vision.full_layers for i in range(config.vision.num_layers)])
    windows = Windows.of(vision.coords, vision.token_class, config.vision.window)
    classes = windows.sort(vision.token_class)
    return windows, VisionContext(None, classes, windows.inside, jax.numpy.asarray(full))


def test_patches_see_their_window_or_their_picture(made) -> None:
    config, _, _ = made
    vision = pack_vision(pictures(config), GRIDS, config.merge_size)
    windows, ctx = sorted_by_window(config, vision)
    back = np.argsort(windows.order, axis=1)
    real, cells = np.asarray(vision.valid), np.asarray(vision.coords) // config.vision.window
    same = (cells[:, :, None] == cells[:, None]).all(-1)
    for layer in range(config.vision.num_layers):
        expected = same | (layer in config.vision.full_layers)
        got = np.asarray(ctx.at_layer(layer).seen.mask)
        got = np.take_along_axis(got, back[:, :, None], 1)
        got = np.take_along_axis(got, back[:, None], 2)
        np.testing.assert_array_equal(got[real], (expected & real[:, None])[real])
    columns = np.arange(real.shape[1])
    far = np.abs(columns[:, None] - columns) > ctx.inside.before
    assert not (np.asarray(ctx.inside.mask) & far).any()
    np.testing.assert_array_equal(windows.restore(windows.sort(vision.coords)), vision.coords)


def test_a_recomputing_runner_is_the_same_and_has_gradients(made) -> None:
    config, _, model = made
    vision = pack_vision(pictures(config), GRIDS[1:3], config.merge_size)
    (windows, ctx), stack = sorted_by_window(config, vision), model.vision.layers
    shape = *vision.valid.shape, config.vision.hidden_size
    x = jax.random.normal(jax.random.key(1), shape)

    def out(x):
        return Recomputing().layers("vision/layers", stack, x, ctx)

    real = np.asarray(windows.sort(vision.valid))
    assert relative(out(x)[real], scan_blocks(stack, x, ctx)[real]) < 1e-6
    slope = jax.grad(lambda x: (out(x)[real] ** 2).sum())(x)
    assert np.isfinite(slope).all() and (np.abs(slope[real]) > 0).any()


def test_depth_does_not_change_the_program(made) -> None:
    """One loop body serves windowed and full layers."""

    def steps(config, model) -> dict[str, int]:
        vision = pack_vision(pictures(config), GRIDS, config.merge_size)
        text = str(jax.make_jaxpr(lambda v: model.vision(v))(vision))
        return {name: text.count(f"{name}[") for name in ("scan", "cond", "dot_general", "gather")}

    config, _, model = made
    deep, _, deeper = layers(6, (*config.vision.full_layers, 5))
    assert steps(config, model) == steps(deep, deeper)
