"""Quantise a model from input to output, each part on what the quantised parts before it deliver.

One pass of the calibration batch through the model, with :class:`QuantizingRunner` in the place of
the usual runner. A block is handled point by point in running order: watch the inputs, set the
static scale, round the weights behind the point, go on with the rounded weights. Then the whole
quantised block, activations included, produces the input of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.nn.params import Params, assign, variables
from mquant_jax.nn.stack import Runner, num_layers
from mquant_jax.numerics import QWeight
from mquant_jax.ptq.gptq import accumulate, gptq
from mquant_jax.ptq.observe import Histogram, layer_of, run_tapped
from mquant_jax.ptq.scales import activation_scale, clip_search, point_report, round_weight
from mquant_jax.recipe import Recipe, Section

Progress = Callable[[Iterable, str], Iterable]


@partial(jax.jit, static_argnums=0)
def _run(graphdef, state, *args):
    return nnx.merge(graphdef, state)(*args)


class QuantizingRunner(Runner):
    """Quantises every part it is asked to run.

    Args:
        target: the abstract quantised model; tells which tensors are to be made.
        recipe: how.
        section_of: the recipe's section that governs a path.
        chunk: rows of the batch that run at a time.

    Attributes:
        params: path -> ``QWeight`` or ``act_scale``, filled part by part.
        report: ``weights`` (relative error of each weight) and ``points``.
    """

    def __init__(
        self,
        target: nnx.Module,
        recipe: Recipe,
        section_of: Callable[[str, Recipe], Section],
        progress: Progress,
        chunk: int = 16,
    ):
        self.target, self.recipe, self.section_of = target, recipe, section_of
        self.progress, self.chunk = progress, chunk
        self.params: Params = {}
        self.report: dict[str, Any] = {"weights": {}, "points": {}}

    def layers(self, name, stack, x, context):
        graphdef, state = nnx.split(stack)
        for i in self.progress(range(num_layers(stack)), name):
            block = nnx.merge(graphdef, layer_of(state, i))
            x = self._part(f"{name}/{i}", block, self._target(name), (x, context),
                           context.token_class)  # fmt: skip
        return x

    def module(self, name, module, x, classes):
        if not hasattr(module, "POINTS"):  # a point on its own: its reader is handled elsewhere
            self._point(name, module, (x,), classes, module.name, ())
            return module(x)
        return self._part(name, module, self._target(name), (x,), classes)

    def _target(self, name: str) -> nnx.Module:
        node = self.target
        for part in name.split("/"):
            node = getattr(node, part)
        return node

    def _part(self, name, module, target, args, classes):
        """Quantise one module and return what the quantised module makes of ``args``."""
        section = self.section_of(f"{name}/", self.recipe)
        if not section.quantised and section.activations == "none":
            return self._outputs(module, args)
        for point, readers in module.POINTS.items():
            self._point(name, module, args, classes, point, readers)
        quantised = jax.tree.map(lambda leaf: leaf, target)  # new variables: target stays abstract
        own = dict(variables(module))
        for path, _ in variables(target):
            key = "/".join((name, *path))
            value = self.params[key] if key in self.params else own[path].get_value()
            value = value.unpacked() if isinstance(value, QWeight) else value
            assign(quantised, path, jax.tree.map(jnp.asarray, value))
        return self._outputs(quantised, args)

    def _chunks(self, args):
        """Slices of the leading axis of everything in ``args``."""
        rows = jax.tree.leaves(args)[0].shape[0]
        for start in range(0, rows, self.chunk):
            stop = min(start + self.chunk, rows)
            yield slice(start, stop), jax.tree.map(lambda a, s=start, e=stop: a[s:e], args)

    def _outputs(self, module, args):
        graphdef, state = nnx.split(module)
        return jnp.concatenate([_run(graphdef, state, *part) for _, part in self._chunks(args)])

    def _point(self, name, module, args, classes, point, readers) -> None:
        """Scale of one point, then the weights behind it, rounded in place in ``module``."""
        path = f"{name}/{point}"
        section = self.section_of(path, self.recipe)
        readers = readers if section.quantised else ()
        if section.activations != "static" and not readers:
            return
        hists, hessian = self._watch(module, args, classes, point, bool(readers))
        if section.activations == "static":
            hists = self.merged(path, hists)
            scale = activation_scale(hists, self.recipe.calibration.observer, path)
            self.params[f"{path}/act_scale"] = scale
            self.report["points"][path] = point_report(hists, scale)
        for reader in readers:
            kernel = getattr(module, reader).kernel
            weight = kernel.get_value()
            q = self._round(weight, hessian, section)
            self.params[f"{name}/{reader}/kernel"] = jax.tree.map(np.asarray, q.packed())
            rounded = q.dequantize()
            error = jnp.linalg.norm(rounded - weight) / (jnp.linalg.norm(weight) + 1e-30)
            self.report["weights"][f"{name}/{reader}/kernel"] = float(error)
            kernel.set_value(rounded.astype(weight.dtype))

    def merged(self, path: str, hists: list[Histogram]) -> list[Histogram]:
        """One histogram per entry of the point's scale table."""
        if not path.startswith("language/layers/"):
            return hists[:1]  # one class in the tower; the head only ever predicts text
        return hists if self.recipe.modality_scales else [hists[0].merge(hists[1])]

    def _watch(self, module, args, classes, point, with_hessian):
        """Histograms per class of one point's input, and the Hessian of what reads it."""
        graphdef, state = nnx.split(module)
        hists, hessian = [Histogram(), Histogram()], None
        for rows, part in self._chunks(args):
            _, taps = run_tapped(graphdef, state, *part)
            value, cls = taps[point], np.asarray(classes)[rows]
            for c, hist in enumerate(hists):
                hist.add(np.asarray(value)[cls == c])
            if with_hessian and self.recipe.weight_method == "gptq":
                if hessian is None:
                    hessian = jnp.zeros((value.shape[-1],) * 2, jnp.float32)
                hessian = accumulate(hessian, value, jnp.asarray(cls >= 0, jnp.float32))
        return hists, hessian

    def _round(self, weight, hessian, section: Section) -> QWeight:
        bits, group_size = section.w_bits, section.group_size
        if hessian is None:
            return round_weight(weight, bits, group_size, self.recipe.weight_clip)
        scale = clip_search(weight, bits, group_size)
        return gptq(weight, hessian, scale, bits)[0]
