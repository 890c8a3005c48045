"""Fusion with static scales: counts the arrays that the compiled program writes to memory."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.aot.hlo import Instruction, parse
from mquant_jax.nn.decoder import Decoder
from mquant_jax.nn.decoder_block import DecoderConfig
from mquant_jax.nn.placement import Placement
from mquant_jax.numerics import QWeight
from mquant_jax.ops.dense import held
from mquant_jax.presets import PRESETS
from mquant_jax.target import tracing_for
from tests.helpers import cpu_target

TOKENS, WIDTH, HIDDEN = 256, 512, 1024
CONFIG = DecoderConfig(
    hidden_size=WIDTH, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64,
    intermediate_size=HIDDEN, vocab_size=64, norm_eps=1e-6, rope_theta=1e4, rope_streams=(0,) * 32,
    max_positions=512, qkv_bias=True, tied_head=True,
)  # fmt: skip
# The default compiler options, which tests/conftest.py changes.
AS_SHIPPED = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    AS_SHIPPED["xla_cpu_use_fusion_emitters"] = True
FREE = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant", "while"}


@functools.cache
def written(preset: str, unsigned: bool) -> list[Instruction]:
    """Instructions of the loop body over layers in a prefill that write an array.

    ``unsigned``: products take unsigned bytes, as on some processors.
    """
    recipe = PRESETS[preset]
    place = Placement.of(recipe, "language", jnp.float32)
    model = nnx.eval_shape(lambda: Decoder(CONFIG, place, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)

    def is_weight(x) -> bool:
        return isinstance(x, QWeight)

    def as_loaded(state):
        return jax.tree.map(lambda x: held(x) if is_weight(x) else x, state, is_leaf=is_weight)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    x = jax.ShapeDtypeStruct((1, TOKENS, WIDTH), jnp.float32)
    run = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))
    tokens = ints(1, TOKENS)
    features = frozenset({"avx512_vnni"} if unsigned else ())
    with tracing_for(cpu_target(features, short_row=4095)):
        text = run.lower(jax.eval_shape(as_loaded, state), x, ints(1, 1, TOKENS), tokens, tokens)
    module = parse(text.compile(AS_SHIPPED).as_text())
    loop = next(i for i in module.entry.instructions.values() if i.opcode == "while")
    body = module.computations[loop.called["body"][0]]

    def fills(i: Instruction) -> bool:
        """Whether it only allocates the result of a loop over row blocks."""
        called = [module.computations[name] for names in i.called.values() for name in names]
        return [c.root.opcode for c in called] == ["broadcast"]

    return [i for i in body.instructions.values() if i.opcode not in FREE and not fills(i)]


def sizes(preset: str, *dtypes: str, unsigned: bool = True) -> list[tuple[int, ...]]:
    """Shapes of activations of at least the stream's size that a layer writes in these dtypes."""
    return [
        a.dims
        for i in written(preset, unsigned)
        for a in i.arrays
        if a.dtype in dtypes and a.size >= TOKENS * WIDTH
        and "dynamic_slice" not in i.source  # slices of stacked weights
    ]  # fmt: skip


def test_one_array_of_bytes_for_each_point() -> None:
    """Each quantisation point writes one int8 array, which q, k and v, or gate and up, share.
    (Online rotation quantises inside its loop over row blocks; unsigned products need a second
    array.)"""
    for preset in ("w4a8", "w4a8-dynamic"):
        for unsigned, last in ((True, [HIDDEN]), (False, [])):
            rows = [shape[-1] for shape in sizes(preset, "s8", "u8", unsigned=unsigned)]
            assert rows == [WIDTH, WIDTH, WIDTH, *last]


def test_static_scales_write_no_float_where_bytes_will_do() -> None:
    """With static scales, norm, attention and activation write int8 directly; dynamic scales need
    the floats in memory first. (Not so after rotation, whose row blocks stay in cache.)"""
    static, dynamic = sizes("w4a8", "f32"), sizes("w4a8-dynamic", "f32")
    assert len(dynamic) == len(static) + 4
    # Only the two residual sums have the stream's shape: scales and biases fuse into products.
    assert len([shape for shape in static if shape[-2:] == (TOKENS, WIDTH)]) == 2
