"""Quantise a model from input to output, each part on what the quantised parts before it deliver.

:class:`Quantiser` is shown the model part by part. A block is handled point by point in running
order: observe the inputs, set the static scale, round the weights of the layers that read them,
continue with the rounded weights. Then the whole quantised block, activations included, produces
the input of the next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mquant_jax.checkpoint.writer import part_of
from mquant_jax.errors import UserError
from mquant_jax.nn.act_quant import SINK, TEXT, TOKEN_CLASSES, VISUAL
from mquant_jax.nn.params import Params, assign, find, variables
from mquant_jax.numerics import INT_MAX, QWeight
from mquant_jax.ptq.factors import placed
from mquant_jax.ptq.gptq import (
    Inputs,
    accumulate,
    empty_gram,
    fitted,
    prepare,
    relative_output_error,
)
from mquant_jax.ptq.observe import Histogram, named, tapped
from mquant_jax.ptq.scales import choose_clip, clip_search, point_report, round_weight
from mquant_jax.ptq.split import split_weight
from mquant_jax.ptq.states import States
from mquant_jax.ptq.statistics import Sampler, classes_at
from mquant_jax.ptq.tune_block import tune_block
from mquant_jax.ptq.walk import LAST, Outputs, Part, block_of, outputs, working
from mquant_jax.ptq.work import Seen, Work, empty_report
from mquant_jax.recipe import Recipe, Section

# Takes the tensors of a finished part; returns what a journal has to know of them.
Sink = Callable[[str, Params], dict[str, Any]]


class Quantiser:
    """A visitor that quantises every part it is shown.

    Args:
        target: the abstract quantised model; tells which tensors are to be made.
        recipe: how.
        dtypes: types in which float tensors are kept; float32 where none is named.
        states: where the inputs of a part's points are kept.
        sink: takes each part's tensors.

    Attributes:
        report: of all parts; see :func:`empty_report`.
        written: names of the tensors that the sink has.
    """

    def __init__(
        self,
        target: nnx.Module,
        recipe: Recipe,
        dtypes: Mapping[str, Any],
        states: States,
        sink: Sink,
    ):
        self.target, self.recipe = target, recipe
        self.dtypes, self.states, self.sink = dtypes, states, sink
        self.multimodal = getattr(target, "vision", None) is not None
        self.report = empty_report()
        self.written: set[str] = set()
        self._work: Work | None = None

    # --- the visitor -------------------------------------------------------------------------

    def visit(self, part: Part):
        if part.name == LAST:  # a point on its own: its reader, the head, is handled elsewhere
            self._work = Work(dataclasses.replace(part, name="language"), None)
            point: Any = part.module
            self._point(self._work, point.name, ("head",), fixed=True)
            return outputs(part.module, part.inputs), None
        self._work = work = Work(part, self._target(part.name))
        if part.twin is not None:
            work.twin = _copy(part.module)
        module: Any = part.module
        for name, readers in module.POINTS.items():
            self._point(work, name, readers)
        quantised = self._quantised(work) if self._touches(part) else part.module
        for spool in work.known.values():
            spool.clear()
        twin: Outputs | None = None
        if part.twin is not None:
            assert work.twin is not None, "copied above, before anything was rounded"
            graphdef, state = work.twin
            twin = outputs(nnx.merge(graphdef, state), part.twin)
            if self.recipe.learns_blocks and work.made:
                quantised, twin = self._learned(work, quantised, twin)
        return outputs(quantised, part.inputs), twin

    def record(self, name: str) -> dict[str, Any]:
        work, self._work = self._work, None
        assert work is not None, "a part is visited before it is recorded"
        tensors = self._tensors(work)
        record = self.sink(part_of(next(iter(tensors), name)), tensors)
        record |= {"report": work.report, "names": list(tensors)}
        self.restore(name, record)
        return record

    def restore(self, name: str, record: dict[str, Any]) -> None:
        self.written |= set(record["names"])
        for kind, entries in record["report"].items():
            self.report[kind].update(entries)

    def _touches(self, part: Part) -> bool:
        """Whether the recipe quantises weights or activations of a part."""
        module: Any = part.module
        readers = (reader for names in module.POINTS.values() for reader in names)
        sections = (self.recipe.section_for(f"{part.name}/{reader}") for reader in readers)
        return any(s.quantised or s.activations != "none" for s in sections)

    def _target(self, name: str) -> Any:
        """The abstract quantised form of a part."""
        stack, _, number = name.rpartition("/")
        if number.isdigit():
            return block_of(find(self.target, stack), int(number))
        return find(self.target, name)

    def _quantised(self, work: Work) -> nnx.Module:
        """The quantised module, with one int8 per weight."""
        module = jax.tree.map(lambda leaf: leaf, work.target)  # new variables: stays abstract
        own = dict(variables(work.part.module))
        for path, _ in variables(work.target):
            key = "/".join((work.part.name, *path))
            value = work.made[key] if key in work.made else own[path].get_value()
            value = value.unpacked() if isinstance(value, QWeight) else value
            assign(module, path, jax.tree.map(working, value))
        return module

    def _tensors(self, work: Work) -> Params:
        """Everything that the checkpoint holds of a part."""
        if work.target is None:
            return work.made
        own, out = dict(variables(work.part.module)), {}
        for path, _ in variables(work.target):
            key = "/".join((work.part.name, *path))
            if key in work.made:
                out[key] = work.made[key]
            else:
                dtype = self.dtypes.get(key, np.float32)
                out[key] = np.asarray(own[path].get_value()).astype(dtype)
        return out

    def _learned(self, work: Work, block: nnx.Module, twin: Outputs) -> tuple[nnx.Module, Outputs]:
        """A block of the language model with learned scales, and the float model's outputs."""
        part = work.part
        if not part.name.startswith("language/layers/"):
            return block, twin
        targets = self.states.kept(twin)
        learned, report = tune_block(block, part.inputs, targets, self.recipe.tune)
        work.report["tuning"][part.name] = report
        own = self._tensors(work)
        for path, value in learned.items():
            name = f"{part.name}/{path}"
            work.made[name] = placed(own[name], value)
        return self._quantised(work), targets.drained()

    # --- points ------------------------------------------------------------------------------

    def _point(self, work: Work, point: str, layers: tuple[str, ...], fixed: bool = False) -> None:
        """Set one point's scale, then round its readers' weights in place in the module.

        ``fixed``: those weights are rounded elsewhere.
        """
        part = work.part
        path = f"{part.name}/{point}"
        sections = {r: self.recipe.section_for(f"{part.name}/{r}") for r in layers}
        static = sections[layers[0]].mode(point) == "static"  # all readers agree
        readers = () if fixed else tuple(r for r in layers if sections[r].quantised)
        if not static and not readers:
            return
        seen = self._watch(work, point, bool(readers))
        kernels = {reader: find(part.module, reader).kernel for reader in readers}
        if static:
            self._set_scale(path, work, seen, [k.get_value() for k in kernels.values()])
        else:
            work.report["ranges"][path] = {
                name: hist.range_report()
                for name, hist in zip(TOKEN_CLASSES, seen.hists, strict=True)
                if not hist.empty
            }
        if not readers:
            return
        inputs = None
        if seen.hessian is not None:
            with named(path):
                inputs = prepare(seen.hessian, seen.cross, self.recipe.weights.act_order)
        whole = [r for r in readers if not getattr(find(work.target, r), "has_split", False)]
        together: dict[str, QWeight] = {}
        for section in dict.fromkeys(sections[r] for r in whole):
            alike = [r for r in whole if sections[r] == section]
            together |= self._round_together(alike, kernels, inputs, section)
        for reader, kernel in kernels.items():
            weight = kernel.get_value()
            name = f"{part.name}/{reader}"
            if reader in together:
                q = together[reader]
                work.made[f"{name}/kernel"] = q.packed()
                rounded = np.asarray(q.dequantize())
            else:
                rounded = self._round_split(work, name, weight, seen, inputs, sections[reader])
            before = np.asarray(weight, np.float32)
            if before.any() and not rounded.any():
                raise UserError(
                    f"{name}: the recipe rounds every weight to zero; choose more bits or groups"
                )
            error = np.linalg.norm(rounded - before) / (np.linalg.norm(before) + 1e-30)
            work.report["weights"][f"{name}/kernel"] = float(error)
            if inputs is not None:
                lost = relative_output_error(before, rounded, inputs.hessian)
                work.report["outputs"][f"{name}/kernel"] = lost
            kernel.set_value(jnp.asarray(rounded.astype(weight.dtype)))

    def _round_together(self, readers, kernels, inputs, section: Section) -> dict[str, QWeight]:
        """Layers that read one point as one matrix: rows are rounded each on its own, and the long
        loop over the columns runs once."""
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

    def _set_scale(self, path: str, work: Work, seen: Seen, weights: list[jax.Array]) -> None:
        """``act_scale`` of one point: a class that calibration did not show takes text's.

        Raises:
            UserError: a multimodal model was shown no picture.
        """
        observer, gram = self.recipe.calibration.observer, None
        if observer == "output" and weights:
            gram = functools.reduce(jnp.add, (w.T @ w for w in weights))
        groups = self.class_groups(path)
        shown = any((np.asarray(c) == VISUAL).any() for c in work.part.classes)
        if self.multimodal and (VISUAL,) in groups and not shown:
            raise UserError(
                f"calibration data holds no visual tokens (seen at {path}); "
                "static scales need prompts with pictures and text"
            )
        clips: dict[int, float] = {}
        for group in groups:
            hist = Histogram.merged([seen.hists[c] for c in group])
            if not hist.empty:
                sampled = [r for c in group if (r := seen.samples[c].rows) is not None]
                rows = np.concatenate(sampled) if gram is not None else None
                clip = self.recipe.calibration.headroom * choose_clip(hist, observer, rows, gram)
                clips |= dict.fromkeys(group, clip)
        if not clips:
            raise UserError(f"calibration data holds no tokens at {path}")
        fallback = next(iter(clips.values()))
        entries = range(len(TOKEN_CLASSES) if len(groups) > 1 else 1)
        table = [max(clips.get(c, fallback) / INT_MAX[8], 1e-12) for c in entries]
        work.made[f"{path}/act_scale"] = np.asarray(table, np.float32)
        known = [c for c in sorted(clips) if not seen.hists[c].empty]
        work.report["points"][path] = point_report(
            [seen.hists[c] for c in known],
            [clips[c] for c in known],
            tuple(TOKEN_CLASSES[c] for c in known),
        )

    def _watch(self, work: Work, point: str, with_hessian: bool) -> Seen:
        """Look at one point's input, and at what the float model has there."""
        part, options = work.part, self.recipe.weights
        sampling = self.recipe.calibration.observer == "output"
        with_hessian &= options.method == "gptq"
        seen = Seen([Histogram() for _ in TOKEN_CLASSES], [Sampler() for _ in TOKEN_CLASSES])
        graphdef, state = nnx.split(part.module)
        importance = self._importance(part.name)
        points = tuple(getattr(part.module, "POINTS", (point,)))
        values = None if point == points[-1] else self.states.spool()
        for n, args in enumerate(part.inputs):
            known = {name: jnp.asarray(spool[n]) for name, spool in work.known.items()}
            value = tapped(graphdef, point, state, known, *args)
            if values is not None:
                values.append(value)
            cls = np.asarray(classes_at(part.module, point, args, part.classes[n]))
            array = np.asarray(value)
            for c, hist in enumerate(seen.hists):
                with named(f"{part.name}/{point}"):
                    hist.add(array[cls == c])
                if sampling and (cls == c).any():
                    seen.samples[c].add(array[cls == c])
            if with_hessian:
                self._accumulate(work, point, n, seen, value, jnp.asarray(importance[cls]))
        if values is not None:
            work.known[point] = values
        return seen

    def _importance(self, name: str) -> np.ndarray:
        """Weight of each token class in a Hessian, float32; the last entry is padding's."""
        importance = np.ones(len(TOKEN_CLASSES) + 1, np.float32)
        if name.startswith("language/"):
            options = self.recipe.weights
            importance[VISUAL], importance[SINK] = options.visual_weight, options.sink_weight
        importance[-1] = 0.0
        return importance

    def _accumulate(self, work: Work, point: str, n: int, seen: Seen, value, weight) -> None:
        """Add one chunk to the Hessian, and to what the float model's inputs differ by."""
        options, twin = self.recipe.weights, None
        if options.needs_float_inputs and work.twin is not None and work.part.twin is not None:
            graphdef, state = work.twin
            twin = tapped(graphdef, point, state, {}, *work.part.twin[n])
        value = twin if options.inputs == "float" else value
        if seen.hessian is None:
            seen.hessian = empty_gram(value.shape[-1])
        seen.hessian = accumulate(seen.hessian, value, weight)
        if options.asymmetry and options.inputs == "quantised":
            if seen.cross is None:
                seen.cross = empty_gram(value.shape[-1])
            difference = options.asymmetry * (twin - value)
            seen.cross = accumulate(seen.cross, value, weight, difference)

    def _round_split(
        self, work: Work, name: str, weight, seen: Seen, inputs: Inputs | None, section: Section
    ) -> np.ndarray:
        """Round a weight that may lose a channel; returns it as float."""
        hessian = None
        if inputs is not None:
            hessian = inputs.hessian
            weight = jnp.asarray(inputs.target(weight))
            inputs = dataclasses.replace(inputs, cross=None)

        def round_(w: jax.Array, left_out: int | None) -> QWeight:
            known = inputs
            if hessian is not None and left_out is not None:
                order = self.recipe.weights.act_order
                known = prepare(hessian, None, order, left_out)
            return self._round(w, known, section)

        out = split_weight(weight, hessian, round_, self.recipe.split)
        work.made[f"{name}/kernel"] = out.q.packed()
        work.made[f"{name}/split/index"] = out.index
        work.made[f"{name}/split/column"] = out.column
        work.report["split"][name] = out.report
        return out.dequantize()

    def _round(self, weight, inputs: Inputs | None, section: Section) -> QWeight:
        """Integers as NumPy arrays, one in a byte: from there on nothing has to be compiled."""
        bits, group_size, options = section.w_bits, section.group_size, self.recipe.weights
        if inputs is None:
            return round_weight(weight, bits, group_size, options.clip).unpacked()
        weight = inputs.target(weight)
        scale = clip_search(weight, bits, group_size)
        return fitted(weight, inputs, scale, bits, options.refit)


def _copy(module: nnx.Module) -> tuple[Any, Any]:
    """A module split, with variables of its own: those of the original will be rounded."""
    graphdef, state = nnx.split(module)
    return graphdef, jax.tree.map(lambda leaf: leaf, state)
