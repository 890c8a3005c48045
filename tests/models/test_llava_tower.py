"""Towers and projector against the family's description in plain NumPy, float64.

The goldens cover CLIP and DINOv2; this adds SigLIP, both strategies and every feature layer.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from mquant_jax.models.llava import FAMILY
from mquant_jax.models.llava.config import SIGLIP, LlavaConfig
from mquant_jax.models.squares import pack_vision, patchify
from tests.family_cases import changed_config, model_of, random_params
from tests.helpers import golden, relative
from tests.llava_cases import CLIP, VARIED

erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
}


def norm(x, p, name, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * p[f"{name}/weight"] + p[f"{name}/bias"]


def dense(x, p, name):
    return x @ p[f"{name}/kernel"].T + p.get(f"{name}/bias", 0)


def layer(x, p, at, v):
    """One block: ``x [T, d]``."""
    h = norm(x, p, f"{at}/attn_norm", v.norm_eps)
    q, k, y = (
        dense(h, p, f"{at}/{n}_proj").reshape(len(x), v.num_heads, -1).swapaxes(0, 1) for n in "qkv"
    )
    scores = q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = (weights @ y).swapaxes(0, 1).reshape(x.shape)
    x = x + p.get(f"{at}/attn_gain", 1) * dense(attended, p, f"{at}/o_proj")
    h = dense(norm(x, p, f"{at}/mlp_norm", v.norm_eps), p, f"{at}/fc1")
    return x + p.get(f"{at}/mlp_gain", 1) * dense(ACTIVATIONS[v.activation](h), p, f"{at}/fc2")


def visual(picture, p, c):
    """A picture ``[3, S, S]`` -> visual tokens ``[M, hidden]``."""
    v, size, side = c.vision, c.patch_size, c.image_size // c.patch_size
    rows = [
        picture[:, r * size : (r + 1) * size, i * size : (i + 1) * size].ravel()
        for r in range(side)
        for i in range(side)
    ]
    x = dense(np.stack(rows), p, "vision/patch_embed/proj")
    if c.tower != SIGLIP:
        x = np.concatenate([p["vision/class_token"], x])
    x = x + p["vision/positions"]
    if "vision/input/norm/weight" in p:
        x = norm(x, p, "vision/input/norm", v.norm_eps)
    for i in range(v.num_layers):
        x = layer(x, p, f"vision/layers/{i}", v)
    x = x[1:] if c.vision.drops_first else x
    h = ACTIVATIONS[c.projector_act](dense(x, p, "vision/merger/fc1"))
    return dense(h, p, "vision/merger/fc2")


def check(case, changes, image_size=56) -> LlavaConfig:
    changes = changes | {
        "vision_config": changes.get("vision_config", {}) | {"image_size": image_size}
    }
    config = LlavaConfig.from_hf(changed_config(case, **changes))
    params = random_params(FAMILY, config, seed=1)
    pixels = golden(*case.split("/"))[1]["pixel_values"][:2, :, :image_size, :image_size]
    patches = patchify(pixels, config.patch_size)
    vision = pack_vision(patches.reshape(-1, patches.shape[-1]), config.vision.position_grid)
    got = np.asarray(model_of(FAMILY, config, params).vision(vision))
    assert got.shape[1:] == (config.image_tokens, config.language.hidden_size)
    double = {k: np.asarray(v, np.float64) for k, v in params.items()}
    for i, picture in enumerate(pixels.astype(np.float64)):
        assert relative(got[i], visual(picture, double, config)) < 1e-5
    return config


@pytest.mark.parametrize("name", VARIED)
def test_visual_tokens(name) -> None:
    assert check(*VARIED[name]).image_tokens == 16


def test_siglip_drops_its_first_patch_and_pixels_that_fill_none() -> None:
    changes = VARIED["siglip"][1] | {"vision_feature_select_strategy": "default"}
    assert check(CLIP, changes, image_size=53).image_tokens == 8


def test_the_class_token_is_kept_where_all_are() -> None:
    changes = {"vision_feature_select_strategy": "full", "projector_hidden_act": "quick_gelu"}
    assert check(CLIP, changes).image_tokens == 17
