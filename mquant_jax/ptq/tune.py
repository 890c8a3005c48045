"""Learn scales after rounding, by gradient descent on the divergence from the float model.

GPTQ optimises one layer at a time; this optimises the whole language model. The integers do not
change. The weights' scales, the static activation scales and the norms' gains (a few numbers per
channel) move to minimise the Kullback-Leibler divergence of the predicted tokens, with activations
rounded as at inference. This is the end-to-end stage of EfficientQAT (arXiv 2407.11062) with the
float model instead of labels. Gradients pass straight through the rounding, for scales as in LSQ
(arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.act_quant import TEXT, VISUAL
from mquant_jax.nn.params import Params
from mquant_jax.nn.stack import Runner, scan_tapped
from mquant_jax.ptq.factors import STEP_TOKENS, learned_values, rates, scaled, simulated, start
from mquant_jax.ptq.walk import Progress, loaded_batch, on_device
from mquant_jax.recipe import Tuning


class Recomputing(Runner):
    """Keeps the outputs of dense layers and recomputes the rest for the gradient: attention and the
    simulated rounding take most of the memory and little of the time."""

    def tapped(self, name, stack, x, context, taps=()):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return scan_tapped(stack, x, context, taps, partial(jax.checkpoint, policy=policy))


@nnx.jit
def _inputs(model: VLM, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    """A decoder's inputs ``[B, T, hidden]``, and what a tower with taps adds after its layers,
    ``[taps + 1, B, T, hidden]``."""
    visual = model.visual(batch)
    x, added = model.embed(batch, visual=visual), model.added(batch, model.parts(visual))
    parts = model.feature_width // x.shape[-1]
    if added is None:
        return x, jnp.zeros((parts, *x.shape), x.dtype) if parts > 1 else None
    return x, added.stacked()


def _shown(
    student: VLM, teacher: VLM, batches: Sequence[Batch]
) -> tuple[jax.Array, jax.Array | None, jax.Array, Batch]:
    """Return the student decoder's :func:`_inputs` and the teacher decoder's outputs, float ``[B,
    T, hidden]``, and the tokens of all prompts, left-padded to one length."""
    length = max(b.input_ids.shape[1] for b in batches)

    def joined(parts: Sequence[Any], axis: int, fill: Any) -> jax.Array:
        wide = []
        for x in parts:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (length - x.shape[axis], 0)
            wide.append(jnp.pad(jnp.asarray(x), widths, constant_values=fill))
        return jnp.concatenate(wide, axis - 1)

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
    embedded, added = zip(*(_inputs(student, b) for b in shown), strict=True)
    return (
        joined(embedded, 1, 0),
        None if added[0] is None else joined(added, 2, 0),
        joined([stream(teacher, b) for b in shown], 1, 0),
        tokens,
    )


def tune(
    student: VLM, teacher: VLM, batches: Sequence[Batch], plan: Tuning, progress: Progress
) -> tuple[Params, dict[str, float]]:
    """Learn the scales and gains of the language model.

    Args:
        student: the quantised model; consumed.
        teacher: the float model.
        batches: calibration prompts; predictions at text tokens count.

    Returns:
        The learned arrays by tensor name (of a quantised weight: its scale), and the divergence in
        nats per token on the calibration prompts in the ``first`` and the ``last`` epoch.
    """
    embedded, added, target, batch = _shown(student, teacher, batches)
    classes = batch.token_class
    marked = student.language.classes(batch.input_ids, batch.order, classes)
    graphdef, state = simulated(student.language)
    factors = start(state)
    together = min(max(1, STEP_TOKENS // classes.shape[1]), classes.shape[0])
    epoch = -(-classes.shape[0] // together)
    sizes, steps = rates(factors, plan), plan.epochs * epoch
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(
        optax.cosine_decay_schedule(1.0, steps)))  # fmt: skip

    @jax.jit
    def prediction(x):
        return jax.nn.log_softmax(teacher.language.logits(x))

    def divergence(factors, state, rows, theirs):
        language = nnx.merge(graphdef, scaled(state, factors))
        place = batch.positions[:, rows], batch.order[rows], marked[rows]
        own = classes[rows] == VISUAL
        deep = None if added is None else added[:, rows]
        x = language(embedded[rows], *place, Recomputing(), visual=own, added=deep)
        ours = jax.nn.log_softmax(language.logits(x))
        kl = (jnp.exp(theirs) * (theirs - ours)).sum(-1)
        asked = classes[rows] == TEXT
        return jnp.where(asked, kl, 0.0).sum() / asked.sum()

    @jax.jit
    def step(factors, moments, state, rows, theirs):
        value, slope = jax.value_and_grad(divergence)(factors, state, rows, theirs)
        change, moments = optimizer.update(slope, moments)
        change = jax.tree.map(lambda c, size: size * c, change, sizes)
        return optax.apply_updates(factors, change), moments, value

    rng, moments, losses = np.random.default_rng(0), optimizer.init(factors), []
    rounds = [rng.permutation(classes.shape[0]) for _ in range(plan.epochs)]
    rows = np.stack([np.resize(r, (epoch, together)) for r in rounds]).reshape(-1, together)
    for chosen in progress(rows, "learn scales"):
        theirs = prediction(target[chosen])
        factors, moments, value = step(factors, moments, state, chosen, theirs)
        losses.append(float(value))
    nnx.update(student.language, scaled(state, factors))
    out = {f"language/{name}": value for name, value in learned_values(student.language).items()}
    report = {"first": float(np.mean(losses[:epoch])), "last": float(np.mean(losses[-epoch:]))}
    return out, report
