"""What static scales make possible: count, in the compiled program, what is written to memory."""

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
    intermediate_size=HIDDEN, vocab_size=64, norm_eps=1e-6, rope_theta=1e4, rope_sections=(32,),
    max_positions=512, qkv_bias=True, tied_head=True,
)  # fmt: skip
# As users' programs are compiled, and not as tests are (tests/conftest.py).
AS_SHIPPED = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    AS_SHIPPED["xla_cpu_use_fusion_emitters"] = True
FREE = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant", "while"}


@functools.cache
def written(preset: str, unsigned: bool) -> list[Instruction]:
    """What one layer of a prefill writes: the instructions of the loop over layers.

    ``unsigned``: products take unsigned bytes, as they do on some processors.
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
        """Whether it makes the array that a loop over blocks of rows then writes."""
        called = [module.computations[name] for names in i.called.values() for name in names]
        return [c.root.opcode for c in called] == ["broadcast"]

    return [i for i in body.instructions.values() if i.opcode not in FREE and not fills(i)]


def sizes(preset: str, *dtypes: str, unsigned: bool = True) -> list[tuple[int, ...]]:
    """Shapes of the activations that a layer writes in these types, those of a width or more."""
    return [
        a.dims
        for i in written(preset, unsigned)
        for a in i.arrays
        if a.dtype in dtypes and a.size >= TOKENS * WIDTH
        and "dynamic_slice" not in i.source  # a layer's weights out of the stack
    ]  # fmt: skip


def test_one_array_of_bytes_for_each_point() -> None:
    """Shared by queries, keys and values, and by gate and up. (What is rotated online becomes
    bytes inside the loop over blocks, and once more if it has to be unsigned.)"""
    for preset in ("w4a8", "w4a8-dynamic"):
        for unsigned, last in ((True, [HIDDEN]), (False, [])):
            rows = [shape[-1] for shape in sizes(preset, "s8", "u8", unsigned=unsigned)]
            assert rows == [WIDTH, WIDTH, WIDTH, *last]


def test_static_scales_write_no_float_where_bytes_will_do() -> None:
    """Norm, attention, activation and rotation end in bytes at once; scales that are found at run
    time need the floats in memory. (Not those of the rotation, which goes by blocks of rows that
    caches hold.)"""
    static, dynamic = sizes("w4a8", "f32"), sizes("w4a8-dynamic", "f32")
    assert len(dynamic) == len(static) + 4
    # Of the stream's own shape there are its two sums: scales, biases and sums end the products.
    assert len([shape for shape in static if shape[-2:] == (TOKENS, WIDTH)]) == 2
