"""Learned scales: after rounding, by gradient on the divergence from the float model.

GPTQ serves one layer at a time; this looks at the whole language model. The integers stay. The
weights' scales, the static activation scales and the norms' gains, a few numbers per channel, move
towards the least Kullback-Leibler divergence of the predicted tokens, activations rounded as they
will be (the end-to-end stage of EfficientQAT, arXiv 2407.11062, with the float model in the place
of labels; gradients pass the rounding straight through, for scales as in LSQ, arXiv 1902.08153).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.act_quant import TEXT, VISUAL, ActQuant
from mquant_jax.nn.params import Params, get_params
from mquant_jax.nn.stack import Runner
from mquant_jax.numerics import QWeight
from mquant_jax.ptq.walk import Progress, loaded_batch, on_device
from mquant_jax.recipe import Tuning

# Per step. Fewer are a noisy guide: short prompts, two at a time, taught activation scales to clip
# what they had not seen. And few prompts make few steps, which cannot fit them too closely.
STEP_TOKENS = 1024


class _Recomputing(Runner):
    """Keeps what dense layers deliver and computes the rest again for the gradient: attention and
    the simulated rounding take most of the memory and little of the time."""

    def layers(self, name, stack, x, context):
        graphdef, state = nnx.split(stack)

        @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        def body(carry, layer):
            return nnx.merge(graphdef, layer)(carry, context), None

        return jax.lax.scan(body, x, state)[0]


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, QWeight)


def _names(path: tuple) -> list[str]:
    return [str(getattr(p, "key", p)) for p in path]


def _kind(path: tuple, leaf: Any) -> str:
    """Which of the rates applies."""
    return "act_scale" if "act_scale" in _names(path) else "other"


def _learned(path: tuple, leaf: Any) -> jax.Array | None:
    """The part of a block's parameter that is learned, if there is one."""
    names = _names(path)
    if isinstance(leaf, QWeight):
        return leaf.scale if "layers" in names else None
    return leaf if "act_scale" in names or any(n.endswith("norm") for n in names) else None


def _scaled(leaf: Any, factor: jax.Array | None) -> Any:
    """A parameter with its learned part multiplied by ``exp(factor)``: no sign can flip."""
    if factor is None:
        return leaf
    if isinstance(leaf, QWeight):
        return dataclasses.replace(leaf, scale=leaf.scale * jnp.exp(factor))
    return leaf * jnp.exp(factor)


def _shown(
    student: VLM, teacher: VLM, batches: Sequence[Batch]
) -> tuple[jax.Array, jax.Array, Batch]:
    """What enters the student's decoder and what leaves the teacher's, float ``[B, T, hidden]``,
    and the tokens of all prompts, padded on the left to one length."""
    length = max(b.input_ids.shape[1] for b in batches)

    def joined(parts: Sequence[Any], axis: int, fill: Any) -> jax.Array:
        wide = []
        for x in parts:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (length - x.shape[axis], 0)
            wide.append(jnp.pad(jnp.asarray(x), widths, constant_values=fill))
        return jnp.concatenate(wide, axis - 1)

    embed = nnx.jit(lambda model, batch: model.embed(batch))
    stream = nnx.jit(lambda model, batch: model.stream(batch))
    shown = [on_device(loaded_batch(b)) for b in batches]
    tokens = Batch(
        input_ids=joined([b.input_ids for b in shown], 1, 0),
        order=joined([b.order for b in shown], 1, -1),
        positions=joined([b.positions for b in shown], 2, 0),
        token_class=joined([b.token_class for b in shown], 1, -1),
        visual_index=joined([b.visual_index for b in shown], 1, -1),
        vision=None,
    )
    embedded = joined([embed(student, b) for b in shown], 1, 0)
    return embedded, joined([stream(teacher, b) for b in shown], 1, 0), tokens


def tune(
    student: VLM, teacher: VLM, batches: Sequence[Batch], plan: Tuning, progress: Progress
) -> tuple[Params, dict[str, float]]:
    """Learn the scales and gains of the language model.

    Args:
        student: the quantised model; used up.
        teacher: the float model.
        batches: calibration prompts; what counts is what is predicted at text tokens.

    Returns:
        The learned arrays by tensor name (of a quantised weight: its scale), and the divergence in
        nats per token on the calibration prompts, ``first`` and ``last`` epoch.
    """
    embedded, target, batch = _shown(student, teacher, batches)
    classes = batch.token_class
    marked = student.language.classes(batch.input_ids, batch.order, classes)
    for _, node in nnx.iter_graph(student.language):
        if isinstance(node, ActQuant):
            node.simulated = True
    graphdef, state = nnx.split(student.language)
    unpack = partial(jax.tree.map, lambda w: w.unpacked() if _is_weight(w) else w)
    state = unpack(state, is_leaf=_is_weight)
    learned = jax.tree_util.tree_map_with_path(_learned, state, is_leaf=_is_weight)
    factors = jax.tree.map(jnp.zeros_like, learned)
    together = min(max(1, STEP_TOKENS // classes.shape[1]), classes.shape[0])
    epoch = -(-classes.shape[0] // together)
    rates = {"act_scale": plan.act_rate, "other": plan.rate}
    optimizer = optax.multi_transform(
        {k: optax.adam(optax.cosine_decay_schedule(r, plan.epochs * epoch))
         for k, r in rates.items()},
        jax.tree_util.tree_map_with_path(_kind, factors),
    )  # fmt: skip

    @jax.jit
    def prediction(x):
        return jax.nn.log_softmax(teacher.language.logits(x))

    def divergence(factors, state, rows, theirs):
        language = nnx.merge(graphdef, jax.tree.map(_scaled, state, factors, is_leaf=_is_weight))
        place = batch.positions[:, rows], batch.order[rows], marked[rows]
        own = classes[rows] == VISUAL
        x = language(embedded[rows], *place, _Recomputing(), visual=own)
        ours = jax.nn.log_softmax(language.logits(x))
        kl = (jnp.exp(theirs) * (theirs - ours)).sum(-1)
        asked = classes[rows] == TEXT
        return jnp.where(asked, kl, 0.0).sum() / asked.sum()

    @jax.jit
    def step(factors, moments, state, rows, theirs):
        value, slope = jax.value_and_grad(divergence)(factors, state, rows, theirs)
        change, moments = optimizer.update(slope, moments)
        return optax.apply_updates(factors, change), moments, value

    rng, moments, losses = np.random.default_rng(0), optimizer.init(factors), []
    rounds = [rng.permutation(classes.shape[0]) for _ in range(plan.epochs)]
    rows = np.stack([np.resize(r, (epoch, together)) for r in rounds]).reshape(-1, together)
    for some in progress(rows, "learn scales"):
        theirs = prediction(target[some])
        factors, moments, value = step(factors, moments, state, some, theirs)
        losses.append(float(value))
    nnx.update(student.language, jax.tree.map(_scaled, state, factors, is_leaf=_is_weight))
    out = {
        f"language/{name}": value.scale if _is_weight(value) else value
        for name, value in get_params(student.language).items()
        if name.endswith(("act_scale", "norm/weight")) or _is_weight(value)
    }
    report = {"first": float(np.mean(losses[:epoch])), "last": float(np.mean(losses[-epoch:]))}
    return out, report
