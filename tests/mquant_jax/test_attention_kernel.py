"""The attention kernel for TPU, in interpret mode, against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.processing import reference_batch
from mquant_jax.nn.params import get_params, set_params
from mquant_jax.nn.rope import apply_rope
from mquant_jax.numerics import QTensor
from mquant_jax.ops.attention import ROWS, SEPARATE, Rows, split_heads
from mquant_jax.ops.pallas_tpu_attention import Plan, attend_rows, plan
from mquant_jax.ops.visibility import NEVER, Visibility
from mquant_jax.presets import PRESETS
from mquant_jax.target import tracing_for
from tests.helpers import golden, interpreting, mostly_slow, random_quantised, relative

ROUNDING = 0.005  # relative, of bfloat16 results


def heads(x: jax.Array, d: int, angles: jax.Array | None) -> np.ndarray:
    """Split into heads in float64 ``[B, heads, T, d]``, after rope in float32."""
    x = split_heads(x.astype(jnp.float32), d)
    return np.asarray(x if angles is None else apply_rope(x, angles), np.float64)


def reference(
    q, k, v, d, visible: Visibility, angles=None, gain=None
) -> tuple[np.ndarray, np.ndarray]:
    """Expected result of :func:`attend_rows`, and which queries see any key."""
    q, k, v = heads(q, d, angles), heads(k, d, angles), heads(v, d, None)
    q = q if gain is None else q * np.asarray(gain, np.float64)[:, None, :, None]
    g = q.shape[1] // k.shape[1]
    logits = np.einsum("bhtd,bhsd->bhts", q, np.repeat(k, g, axis=1)) * d**-0.5
    seen = (np.asarray(visible.keys)[:, None, :] <= np.asarray(visible.top)[:, :, None])[:, None]
    logits = np.where(seen, logits, -1e300)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    y = np.einsum("bhts,bhsd->bhtd", weights, np.repeat(v, g, axis=1))
    return y.swapaxes(1, 2).reshape(*y.shape[::2][:1], y.shape[2], -1), seen.any(axis=-1)[:, 0]


def operands(b: int, t: int, widths: tuple[int, int], seed: int = 0):
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=(b, t, w)), jnp.bfloat16)
        for w in (widths[0], widths[1], widths[1])
    )
    return rng, q, k, v


def visibility(rng, kind: str, b: int, t: int) -> Visibility:
    """Visibility of a causal prompt after left padding (``row``), of one with tokens moved to the
    front as in AIFS (``moved``), or of a padded picture whose patches all see each other."""
    if kind == "picture":
        keys = np.where(np.arange(t) < t - 9, 0, NEVER)
        return Visibility(
            jnp.zeros((b, t), jnp.int32), jnp.asarray(np.tile(keys, (b, 1)), jnp.int32)
        )
    order = np.tile(np.arange(t), (b, 1))
    if kind == "moved":
        order = np.stack([np.concatenate([p[: t // 2], np.sort(p[t // 2 :])])
                          for p in (rng.permutation(t) for _ in range(b))])  # fmt: skip
    keys = order.copy()
    order[-1, :11], keys[-1, :11] = -1, NEVER
    return Visibility(jnp.asarray(order, jnp.int32), jnp.asarray(keys, jnp.int32))


CASES = {
    "grouped, in order": ("row", 2, 150, Plan(1, 2, 128, 128, 128, 2, 2), 128),
    "heads across registers": ("picture", 1, 200, Plan(4, 1, 96, 128, 128, 2, 2), 96),
    "moved, half a turn": ("moved", 2, 140, Plan(2, 2, 64, 128, 128, 2, 2), 32),
    "one block, no turn": ("picture", 1, 100, Plan(2, 1, 72, 128, 128, 1, 1), 0),
    "wide heads": ("row", 1, 130, Plan(1, 2, 256, 128, 128, 2, 2), 256),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel(case) -> None:
    kind, b, t, cut, turning = CASES[case]
    kv = 2 if cut.n == 1 else cut.n
    rng, q, k, v = operands(b, t, (kv * cut.g * cut.d, kv * cut.d))
    seen = visibility(rng, kind, b, t)
    angles = jnp.asarray(rng.uniform(0, 7, (b, t, turning // 2)), jnp.float32) if turning else None
    gain = jnp.asarray(rng.uniform(1, 1.5, (b, t)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.004, 0.05, (b, t, 1)), jnp.float32)
    expected, sees = reference(q, k, v, cut.d, seen, angles, gain)
    got = attend_rows(q, k, v, seen, cut, angles, gain, interpret=True)
    assert got.shape == expected.shape and got.dtype == jnp.bfloat16
    assert np.isfinite(got.astype(np.float32)).all()  # also queries that see no key
    assert relative(np.asarray(got, np.float64)[sees], expected[sees]) < ROUNDING
    q8 = attend_rows(q, k, v, seen, cut, angles, gain, scale, interpret=True)
    want = np.clip(np.round(expected / np.asarray(scale)), -128, 127)
    off = np.abs(np.asarray(q8, np.float64) - want)[sees]
    assert q8.dtype == jnp.int8 and off.max() <= 2 and off.mean() < 0.1


def test_blocks_that_are_skipped_and_rows_that_see_late_blocks_only() -> None:
    """The first block is computed even if no key in it is visible; its effect must vanish."""
    t, cut = 384, Plan(1, 1, 128, 128, 128, 3, 3)
    rng, q, k, v = operands(1, t, (128, 128), 3)
    keys = np.full(t, NEVER)
    keys[300:] = np.arange(300, t)
    seen = Visibility(jnp.arange(t, dtype=jnp.int32)[None], jnp.asarray(keys, jnp.int32)[None])
    got = attend_rows(q, k * 30, v, seen, cut, interpret=True)
    expected, sees = reference(q, k * 30, v, 128, seen)
    assert sees.sum() == t - 300 and np.isfinite(got.astype(np.float32)).all()
    assert relative(np.asarray(got, np.float64)[sees], expected[sees]) < 2 * ROUNDING


def test_plans() -> None:
    language, tower = plan(1024, 28, 4, 128, True), plan(1024, 16, 16, 80, False)
    assert (language.n, language.g, language.rows, language.keys) == (1, 7, 1024, 256)
    assert (tower.n, tower.keys, tower.slots) == (8, 512, 1024)
    assert plan(130, 16, 16, 72, False).n == 16  # the smallest number that fills whole registers
    assert plan(300, 8, 8, 128, True).rows == 512
    assert plan(1025, 16, 16, 64, False).rows == 1152  # three blocks of 384
    assert plan(40000, 16, 16, 80, False) is None  # keys would not fit on the chip


def test_the_chosen_form() -> None:
    def form(tokens: int, dtype, **more: bool) -> str:
        return ROWS.choose(Rows(tokens, 28, 4, 128, dtype, **more)).name

    with tracing_for("cpu"):
        assert form(1024, jnp.float32) == "heads_cpu"
        assert form(1, jnp.float32) == SEPARATE
    with tracing_for("tpu"):
        assert form(1024, jnp.bfloat16) == form(1024, jnp.bfloat16, low=True) == "pallas_tpu"
        assert form(1024, jnp.bfloat16, gradient=True) == SEPARATE
        assert form(1, jnp.bfloat16) == form(1024, jnp.float32) == SEPARATE
        assert form(2**20, jnp.bfloat16) == SEPARATE


@pytest.mark.parametrize("recipe", mostly_slow(["float", "w4a8"], "w4a8"))
def test_a_whole_model_takes_the_kernel(recipe) -> None:
    """Traced for TPU, tower and decoder call the kernel, and agree with XLA's implementation."""
    hf, inputs, _ = golden("qwen2_vl", "public")
    config = Qwen2VLConfig.from_hf(hf)
    model = random_quantised(config, PRESETS[recipe], dtype=jnp.bfloat16)
    params = get_params(model)
    fine = {n: np.full_like(v, 0.03) for n, v in params.items() if n.endswith("act_scale")}
    set_params(model, params | fine)
    batch = reference_batch(config, inputs)
    plain = jax.jit(lambda model, batch: model(batch))(model, batch)
    with interpreting("tpu", attention_rows=1) as ran:
        got = jax.jit(lambda model, batch: model(batch))(model, batch)
    real = np.asarray(batch.order) >= 0
    assert [c.name for c in ran if c.op == ROWS.name] == ["pallas_tpu"] * 2
    assert relative(np.asarray(got)[real], np.asarray(plain)[real]) < 0.1  # int8 steps differ


def test_what_a_kernel_quantised_passes_the_point() -> None:
    from mquant_jax.nn.act_quant import ActQuant
    from mquant_jax.recipe import Section

    static = ActQuant("p", Section(4, None, "static"), 3)
    cls = jnp.asarray([[0, 1, 2]])
    scale = static.known_scale(cls, None)
    assert scale.shape == (1, 3, 1)
    q = QTensor(jnp.ones((1, 3, 8), jnp.int8), scale)
    assert static(q, cls) is q
    assert static.known_scale(cls, lambda name, x: x) is None
    assert ActQuant("p", Section(4, None, "dynamic")).known_scale(None, None) is None
