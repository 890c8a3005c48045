"""InternViT and the projector against the family's description in plain NumPy, float64.

The goldens cover only the small tower; this tests the large one, which has other norms.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mquant_jax.models.internvl import FAMILY
from mquant_jax.models.internvl.config import InternVLConfig
from mquant_jax.nn.params import get_params
from tests.helpers import golden, relative
from tests.internvl_cases import BIG_TOWER, changed_config, model_of, random_params

erf = np.vectorize(math.erf)


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer(x, p, heads, eps):
    """One block of the tower with RMSNorm: ``x [1 + P, d]``."""

    def dense(x, name):
        return x @ p[f"{name}/kernel"].T + p.get(f"{name}/bias", 0)

    h = rms(x, p["attn_norm/weight"], eps)
    q = rms(dense(h, "q_proj"), p["q_norm/weight"], eps)  # over all heads
    k = rms(dense(h, "k_proj"), p["k_norm/weight"], eps)
    split = [y.reshape(len(x), heads, -1).swapaxes(0, 1) for y in (q, k, dense(h, "v_proj"))]
    q, k, v = split
    scores = q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = (weights @ v).swapaxes(0, 1).reshape(x.shape)
    x = x + p["attn_gain"] * dense(attended, "o_proj")
    h = dense(rms(x, p["mlp_norm/weight"], eps), "fc1")
    return x + p["mlp_gain"] * dense(gelu(h), "fc2")


def tower(tile, p, config):
    """A tile ``[3, S, S]`` -> visual tokens ``[S^2 / 28^2, hidden]``."""
    v, size = config.vision, config.patch_size
    side = tile.shape[-1] // size
    rows = []
    for r in range(side):
        for c in range(side):
            patch = tile[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
            rows.append(p["vision/patch_embed/proj/kernel"] @ patch.ravel())
    x = np.stack(rows) + p["vision/patch_embed/proj/bias"]
    x = np.concatenate([p["vision/class_token"], x]) + p["vision/positions"]
    for i in range(v.num_layers):
        prefix = f"vision/layers/{i}/"
        own = {k.removeprefix(prefix): w for k, w in p.items() if k.startswith(prefix)}
        x = layer(x, own, v.num_heads, v.norm_eps)
    grid = x[1:].reshape(side, side, -1)
    tokens = np.stack([
        np.concatenate([grid[r, c], grid[r, c + 1], grid[r + 1, c], grid[r + 1, c + 1]])
        for r in range(0, side, 2) for c in range(0, side, 2)
    ])  # fmt: skip
    centred = tokens - tokens.mean(-1, keepdims=True)
    h = rms(centred, p["vision/merger/norm/weight"], 1e-5) + p["vision/merger/norm/bias"]
    h = gelu(h @ p["vision/merger/fc1/kernel"].T + p["vision/merger/fc1/bias"])
    return h @ p["vision/merger/fc2/kernel"].T + p["vision/merger/fc2/bias"]


@pytest.mark.parametrize("case", BIG_TOWER)
def test_the_tower_of_rms_norms(case) -> None:
    config = InternVLConfig.from_hf(changed_config(case, vision_config=BIG_TOWER[case]))
    params = random_params(config, seed=1)
    inputs = golden(*case.split("/"))[1]
    batch = FAMILY.reference_batch(config, inputs)
    got = model_of(config, params).vision(batch.vision)
    double = {k: np.asarray(v, np.float64) for k, v in params.items()}
    for i in (0, len(inputs["pixel_values"]) - 1):
        expected = tower(inputs["pixel_values"][i].astype(np.float64), double, config)
        assert relative(got[i], expected) < 1e-5


def test_bfloat16_stays_bfloat16() -> None:
    """No parameter or constant promotes the stream to float32."""
    case = "internvl/public"
    config = InternVLConfig.from_hf(changed_config(case))
    params = random_params(config)
    model = FAMILY.build(config, None, jnp.bfloat16, nnx.Rngs(0))
    assert all(v.dtype == jnp.bfloat16 for v in get_params(model).values())
    batch = FAMILY.reference_batch(config, golden(*case.split("/"))[1])
    assert model.vision(batch.vision).dtype == jnp.bfloat16
    assert model.embed(batch).dtype == jnp.bfloat16
    assert model_of(config, params).vision(batch.vision).dtype == jnp.float32


@pytest.mark.parametrize("case", BIG_TOWER)
def test_measurements_need_no_tokenizer(case) -> None:
    config = InternVLConfig.from_hf(changed_config(case))
    prompt = FAMILY.example_prompt(config, 10, 2 * config.tile_size)
    batch = FAMILY.collate(config, [prompt, FAMILY.example_prompt(config, 7, 0)])
    assert (batch.token_class == 1).sum() == 4 * config.tile_tokens
    assert np.isfinite(model_of(config, random_params(config)).embed(batch)).all()
