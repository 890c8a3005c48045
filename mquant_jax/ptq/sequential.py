"""Quantise a model from input to output, each part on what the quantised parts before it deliver.

One pass of the calibration batch through the model, with :class:`QuantizingRunner` in the place of
the usual runner. A block is handled point by point in running order: watch the inputs, set the
static scale, round the weights behind the point, go on with the rounded weights. Then the whole
quantised block, activations included, produces the input of the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.errors import UserError
from mquant_jax.nn.act_quant import SINK, TEXT, TOKEN_CLASSES, VISUAL
from mquant_jax.nn.params import Params, assign, find, variables
from mquant_jax.nn.stack import Runner, num_layers
from mquant_jax.numerics import INT_MAX, QWeight
from mquant_jax.ptq.gptq import Inputs, accumulate, fitted, prepare
from mquant_jax.ptq.observe import Histogram, layer_of, tapped
from mquant_jax.ptq.scales import choose_clip, clip_search, point_report, round_weight
from mquant_jax.ptq.split import split_weight
from mquant_jax.ptq.statistics import Sampler, chunks, classes_at
from mquant_jax.recipe import Recipe, Section

Progress = Callable[[Iterable, str], Iterable]


@partial(jax.jit, static_argnums=0)
def _run(graphdef, state, *args):
    return nnx.merge(graphdef, state)(*args)


def _copy(module: nnx.Module):
    """A module split, with variables of its own: those of the original will be rounded."""
    graphdef, state = nnx.split(module)
    return graphdef, jax.tree.map(lambda leaf: leaf, state)


@dataclasses.dataclass
class Part:
    """A module in hand.

    Attributes:
        name: its path.
        module: the float module, whose weights are replaced point by point.
        target: its abstract quantised form.
        args: its inputs for the whole calibration batch.
        classes: int32, token class of each row.
        twin: the same module as it was, split, with the float model's inputs.
        known: name of a point that is done -> its inputs, chunk by chunk. No weight before it will
            change, so that later points are reached from there. Not of the last one, the widest.
    """

    name: str
    module: nnx.Module
    target: nnx.Module | None
    args: Any
    classes: jax.Array
    twin: Any = None
    known: dict[str, list[jax.Array]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Seen:
    """What calibration saw at one point.

    Attributes:
        hists: magnitudes by token class.
        samples: a sample of rows by token class.
        hessian: float32 ``[K, K]``, or ``None``.
        cross: float32 ``[K, K]``, how the float model's inputs differ, or ``None``.
    """

    hists: list[Histogram]
    samples: list[Sampler]
    hessian: jax.Array | None = None
    cross: jax.Array | None = None


class QuantizingRunner(Runner):
    """Quantises every part it is asked to run.

    Args:
        target: the abstract quantised model; tells which tensors are to be made.
        recipe: how.
        section_of: the recipe's section that governs a path.
        float_inputs: path of a part -> what enters it in the float model, for the asymmetric GPTQ.
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
        float_inputs: dict[str, jax.Array] | None = None,
        chunk: int = 16,
    ):
        self.target, self.recipe, self.section_of = target, recipe, section_of
        self.progress, self.chunk = progress, chunk
        self.float_inputs = float_inputs
        self.params: Params = {}
        self.report: dict[str, Any] = {"weights": {}, "points": {}}

    def layers(self, name, stack, x, context):
        graphdef, state = nnx.split(stack)
        twin = self.float_inputs[name] if self.float_inputs else None
        for i in self.progress(range(num_layers(stack)), name):
            block = nnx.merge(graphdef, layer_of(state, i))
            part = Part(f"{name}/{i}", block, self._target(name), (x, context),
                        context.token_class)  # fmt: skip
            if twin is not None:
                part.twin = _copy(block), (twin, context)
                twin = self._outputs(block, (twin, context))
            x = self._quantise(part)
        return x

    def module(self, name, module, x, classes):
        if not hasattr(module, "POINTS"):  # a point on its own: its reader is handled elsewhere
            part = Part(name.rpartition("/")[0], module, None, (x,), classes)
            self._point(part, module.name, ())
            return module(x)
        part = Part(name, module, self._target(name), (x,), classes)
        if self.float_inputs:
            part.twin = _copy(module), (self.float_inputs[name],)
        return self._quantise(part)

    def _target(self, name: str) -> nnx.Module:
        return find(self.target, name)

    def _quantise(self, part: Part) -> jax.Array:
        """Quantise one module and return what the quantised module makes of its inputs."""
        section = self.section_of(f"{part.name}/", self.recipe)
        if not section.quantised and section.activations == "none":
            return self._outputs(part.module, part.args)
        for point, readers in part.module.POINTS.items():
            self._point(part, point, readers)
        quantised = jax.tree.map(lambda leaf: leaf, part.target)  # new variables: stays abstract
        own = dict(variables(part.module))
        for path, _ in variables(part.target):
            key = "/".join((part.name, *path))
            value = self.params[key] if key in self.params else own[path].get_value()
            value = value.unpacked() if isinstance(value, QWeight) else value
            assign(quantised, path, jax.tree.map(jnp.asarray, value))
        return self._outputs(quantised, part.args)

    def _outputs(self, module, args):
        graphdef, state = nnx.split(module)
        return jnp.concatenate([_run(graphdef, state, *a) for _, a in chunks(args, self.chunk)])

    def _point(self, part: Part, point: str, readers: tuple[str, ...]) -> None:
        """Scale of one point, then the weights behind it, rounded in place in the module."""
        path = f"{part.name}/{point}"
        section = self.section_of(path, self.recipe)
        readers = readers if section.quantised else ()
        static = section.mode(point) == "static"
        if not static and not readers:
            return
        seen = self._watch(part, point, bool(readers))
        kernels = {reader: find(part.module, reader).kernel for reader in readers}
        if static:
            self._set_scale(path, part, seen, [k.get_value() for k in kernels.values()])
        if not readers:
            return
        inputs = None
        if seen.hessian is not None:
            inputs = prepare(seen.hessian, seen.cross, self.recipe.weights.act_order)
        whole = [r for r in readers if not getattr(find(part.target, r), "has_split", False)]
        together = self._round_together(whole, kernels, inputs, section)
        for reader, kernel in kernels.items():
            weight = kernel.get_value()
            name = f"{part.name}/{reader}"
            if reader in together:
                q = together[reader]
                self.params[f"{name}/kernel"] = q.packed()
                rounded = np.asarray(q.dequantize())
            else:
                rounded = self._round_split(name, weight, seen, inputs, section)
            before = np.asarray(weight, np.float32)
            error = np.linalg.norm(rounded - before) / (np.linalg.norm(before) + 1e-30)
            self.report["weights"][f"{name}/kernel"] = float(error)
            kernel.set_value(jnp.asarray(rounded.astype(weight.dtype)))

    def _round_together(self, readers, kernels, inputs, section: Section) -> dict[str, QWeight]:
        """Layers that read one point as one matrix: rows are rounded each on its own, and the long
        loop over the columns runs once."""
        if not readers:
            return {}
        weights = [np.asarray(kernels[reader].get_value()) for reader in readers]
        q = self._round(np.concatenate(weights), inputs, section)
        ends = np.cumsum([w.shape[0] for w in weights])
        return {
            reader: dataclasses.replace(
                q, values=q.values[end - w.shape[0] : end], scale=q.scale[end - w.shape[0] : end]
            )
            for reader, w, end in zip(readers, weights, ends, strict=True)
        }

    def class_groups(self, path: str) -> tuple[tuple[int, ...], ...]:
        """The token classes that share an entry of the point's scale table."""
        if path.startswith("language/layers/"):
            return self.recipe.class_groups
        return ((TEXT,),)  # one class in the tower; the head only ever predicts text

    def _set_scale(self, path: str, part: Part, seen: Seen, weights: list[jax.Array]) -> None:
        """``act_scale`` of one point: a class that calibration did not show takes text's.

        Raises:
            UserError: a multimodal model was shown no picture.
        """
        observer, gram = self.recipe.calibration.observer, None
        if observer == "output" and weights:
            gram = sum(w.T @ w for w in weights)
        groups = self.class_groups(path)
        multimodal = getattr(self.target, "vision", None) is not None
        if multimodal and (VISUAL,) in groups and not (np.asarray(part.classes) == VISUAL).any():
            raise UserError(
                f"calibration data holds no visual tokens (seen at {path}); "
                "static scales need prompts with pictures and text"
            )
        clips: dict[int, float] = {}
        for group in groups:
            hist = Histogram.merged([seen.hists[c] for c in group])
            if not hist.empty:
                rows = [r for c in group if (r := seen.samples[c].rows) is not None]
                rows = np.concatenate(rows) if gram is not None else None
                clip = self.recipe.calibration.headroom * choose_clip(hist, observer, rows, gram)
                clips |= dict.fromkeys(group, clip)
        if not clips:
            raise UserError(f"calibration data holds no tokens at {path}")
        fallback = next(iter(clips.values()))
        entries = range(len(TOKEN_CLASSES) if len(groups) > 1 else 1)
        table = [max(clips.get(c, fallback) / INT_MAX[8], 1e-12) for c in entries]
        self.params[f"{path}/act_scale"] = np.asarray(table, np.float32)
        known = [c for c in sorted(clips) if not seen.hists[c].empty]
        self.report["points"][path] = point_report(
            [seen.hists[c] for c in known],
            [clips[c] for c in known],
            tuple(TOKEN_CLASSES[c] for c in known),
        )

    def _watch(self, part: Part, point: str, with_hessian: bool) -> Seen:
        """Look at one point's input, and at what the float model has there."""
        options = self.recipe.weights
        sampling = self.recipe.calibration.observer == "output"
        with_hessian &= options.method == "gptq"
        seen = Seen([Histogram() for _ in TOKEN_CLASSES], [Sampler() for _ in TOKEN_CLASSES])
        graphdef, state = nnx.split(part.module)
        importance = np.ones(len(TOKEN_CLASSES) + 1, np.float32)  # the last entry: padding
        if part.name.startswith("language/"):
            importance[VISUAL], importance[SINK] = options.visual_weight, options.sink_weight
        importance[-1] = 0.0
        classes = np.asarray(classes_at(part.module, point, part.args, part.classes))
        points = tuple(getattr(part.module, "POINTS", (point,)))
        values: list[jax.Array] | None = None if point == points[-1] else []
        for n, (rows, args) in enumerate(chunks(part.args, self.chunk)):
            known = {name: arrays[n] for name, arrays in part.known.items()}
            value = tapped(graphdef, point, state, known, *args)
            if values is not None:
                values.append(value)
            cls = classes[rows]
            array = np.asarray(value)
            for c, hist in enumerate(seen.hists):
                hist.add(array[cls == c])
                if sampling and (cls == c).any():
                    seen.samples[c].add(array[cls == c])
            if not with_hessian:
                continue
            weight, twin = jnp.asarray(importance[cls]), None
            if part.twin is not None:
                (graph, own), twin_args = part.twin
                twin_part = jax.tree.map(lambda a, r=rows: a[r], twin_args)
                twin = tapped(graph, point, own, {}, *twin_part)
            value = twin if options.inputs == "float" else value
            if seen.hessian is None:
                seen.hessian = jnp.zeros((value.shape[-1],) * 2, jnp.float32)
            seen.hessian = accumulate(seen.hessian, value, weight)
            if options.asymmetry and options.inputs == "quantised":
                if seen.cross is None:
                    seen.cross = jnp.zeros_like(seen.hessian)
                difference = options.asymmetry * (twin - value)
                seen.cross = accumulate(seen.cross, value, weight, difference)
        if values is not None:
            part.known[point] = values
        return seen

    def _round_split(self, name, weight, seen: Seen, inputs: Inputs | None, section) -> np.ndarray:
        """Round a weight that may lose a channel; returns it as float."""
        hessian = None if inputs is None else seen.hessian
        if inputs is not None and inputs.shift is not None:
            weight = weight + weight @ inputs.shift
            inputs = dataclasses.replace(inputs, shift=None)

        def round_(w: jax.Array, left_out: int | None) -> QWeight:
            known = inputs
            if hessian is not None and left_out is not None:
                # Without the channel in the Hessian nothing is pushed onto it: it stays zero.
                rest = hessian.at[left_out].set(0.0).at[:, left_out].set(0.0)
                known = prepare(rest, None, self.recipe.weights.act_order)
            return self._round(w, known, section)

        out = split_weight(weight, hessian, round_, self.recipe.split)
        self.params[f"{name}/kernel"] = out.q.packed()
        self.params[f"{name}/split/index"] = out.index
        self.params[f"{name}/split/column"] = out.column
        self.report.setdefault("split", {})[name] = out.report
        return out.dequantize()

    def _round(self, weight, inputs: Inputs | None, section: Section) -> QWeight:
        """Integers as NumPy arrays, one in a byte: from there on nothing has to be compiled."""
        bits, group_size, options = section.w_bits, section.group_size, self.recipe.weights
        if inputs is None:
            return round_weight(weight, bits, group_size, options.clip).unpacked()
        if inputs.shift is not None:
            weight = weight + weight @ inputs.shift
        scale = clip_search(weight, bits, group_size)
        return jax.tree.map(np.asarray, fitted(weight, inputs, scale, bits, options.refit))
