"""The registry of implementations: selection, and the record of choices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mquant_jax.models.qwen2_vl import FAMILY
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.ops.attention import CACHE, HEADS, ROWS
from mquant_jax.ops.dense import DENSE
from mquant_jax.ops.norm import NORM
from mquant_jax.ops.registry import Choice, Form, Op, recording, unless
from mquant_jax.ops.rotate import ROTATE
from mquant_jax.presets import PRESETS
from mquant_jax.runtime.choices import choices, rows_of, table
from mquant_jax.target import Target, target, tracing_for
from tests.helpers import cpu_target, golden, random_quantised

OP: Op[int] = Op(
    "double",
    Form("shift", lambda x: x << 1, lambda n, to: unless(
        (to.platform == "tpu", "not a TPU"), (n < 8, f"{n} values; the most is 7")
    )),
    Form("add", lambda x: x + x),
)  # fmt: skip


def test_the_first_form_that_takes_a_call_runs() -> None:
    with tracing_for("cpu"), recording() as made:
        assert OP.pick(3)(jnp.int32(5)) == 10
    assert made == [Choice("double", 3, "add", (("shift", "not a TPU"),))]
    with tracing_for("tpu"), recording() as made:
        OP.pick(3), OP.pick(9), OP.choose(4)  # choose() alone records nothing
    assert [(c.name, c.refused) for c in made] == [
        ("shift", ()), ("add", (("shift", "9 values; the most is 7"),)),
    ]  # fmt: skip
    assert OP.pick(3)(2) == 4  # works without recording


def test_an_op_needs_a_last_resort() -> None:
    with pytest.raises(AssertionError, match="the last form of one refuses: never"):
        Op("one", Form("a", print, lambda n, to: "never")).choose(1)


def test_targets() -> None:
    assert target() is target() and target().platform == jax.default_backend()
    with tracing_for("tpu", "TPU v4") as inner:
        assert target() is inner and inner.early_tpu
        with tracing_for(Target.named("gpu")):
            assert target().kernels_for_gpu and not target().early_tpu
        assert target() is inner
    assert not Target.named("tpu", "TPU v5 lite").early_tpu
    assert Target("cpu", features=frozenset({"avx512_vnni"}), jax_version=(0, 10)).multiplies_bytes
    assert cpu_target(short_row=10).reads_in_place(10)
    assert not cpu_target(short_row=10).reads_in_place(11)
    assert not Target.named("tpu").reads_in_place(1)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_record_of_a_whole_model(platform) -> None:
    """Tracing prefill and decode records every op, for any target, without running it."""
    config = Qwen2VLConfig.from_hf(golden("qwen2_vl", "public")[0])
    model = random_quantised(config, PRESETS["w4a8"], dtype=jnp.bfloat16)
    batch = FAMILY.collate(config, [FAMILY.example_prompt(config, 100, 56)])
    with tracing_for(cpu_target() if platform == "cpu" else platform):
        rows = rows_of(choices(model, batch))
    ops = {(r["phase"], r["op"]) for r in rows}
    everywhere = {DENSE.name, NORM.name, ROTATE.name}
    assert ops >= {(phase, op) for phase in ("prefill", "decode") for op in everywhere}
    assert {("prefill", ROWS.name), ("decode", CACHE.name)} <= ops
    assert ("decode", HEADS.name) in ops or platform == "gpu"  # a separate kernel reads the cache
    dense = [r for r in rows if r["op"] == DENSE.name and r["phase"] == "decode"]
    assert sum(r["calls"] for r in dense) == 7 + 1
    assert all(r["spec"]["activations"] == "int8" for r in dense)
    if platform == "gpu":
        assert {r["form"] for r in dense} == {"pallas_gpu_gemv", "int_dot"}
        (head,) = (r for r in dense if r["form"] == "int_dot")
        assert "4 bits" in head["refused"]["pallas_gpu"]
    text = table(rows)
    assert "decode   dense" in text and "not a " not in text
