"""Load a checkpoint folder into a model that is ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.checkpoint import orbax_format
from mquant_jax.checkpoint.manifest import CONFIG, Verify, load_json, load_manifest, refuse
from mquant_jax.checkpoint.reader import (
    Sink,
    check_files,
    put_rows,
    stored_names,
    stream,
)
from mquant_jax.checkpoint.tensor_file import Entry
from mquant_jax.errors import CheckpointError
from mquant_jax.models.base import VLM, Config, Family, abstract_model, with_head
from mquant_jax.models.registry import family_for
from mquant_jax.nn.params import (
    STACK,
    Params,
    abstract_params,
    assign,
    layer_names,
    parameter_bytes,
    set_params,
    variables,
)
from mquant_jax.numerics import QWeight, empty_aligned, unpack_int4
from mquant_jax.ops.dense import held
from mquant_jax.recipe import Recipe

Hold = Callable[[QWeight], QWeight]


class Loaded(NamedTuple):
    """A loaded checkpoint: the Flax module, the family's config, the manifest, the family, and the
    Hugging Face config."""

    model: VLM
    config: Config
    manifest: dict[str, Any]
    family: Family
    hf_config: dict[str, Any]


def load_model(
    folder: str | Path,
    dtype: Any = None,
    *,
    keep_packed: bool | None = None,
    verify: Verify = True,
) -> Loaded:
    """Load a checkpoint written by ``python -m mquant_jax convert``.

    Files are read directly into the model's arrays; beyond them, only blocks of a few megabytes
    are in memory.

    Args:
        dtype: dtype of everything that is not integer; default float32 on CPU, else bfloat16.
        keep_packed: keep int4 as two values per byte, as in the checkpoint; ``False``: one int8 per
            value. The default is what the platform's kernels need.
        verify: ``True``: every file must equal what was written; ``"tensors"``: JSON files other
            than the manifest may have been edited; ``False``: only sizes are compared.

    Raises:
        CheckpointError: files are missing, damaged or edited, or do not fit the model.
    """
    folder = Path(folder)
    manifest = load_manifest(folder, verify)
    check_files(folder, manifest, verify)
    loaded = _described_model(folder, manifest, dtype)
    model = loaded.model
    hold = {None: held, True: QWeight.packed, False: QWeight.unpacked}[keep_packed]
    if manifest["format_version"] == 2:
        params = orbax_format.read(folder, manifest, bool(verify))
        set_params(model, params, lambda x, like: _converted(x, like, hold))
    else:
        _Filler(model, manifest, hold).fill(folder, verify)
    return loaded


def outline(folder: str | Path, verify: Verify = False) -> Loaded:
    """A checkpoint with shapes instead of arrays, in the layout of the platform that is traced for.

    Args:
        verify: as of :func:`load_model`, which reads all files once; without it only JSON files
            are read.

    Raises:
        CheckpointError: see :func:`load_model`.
    """
    folder = Path(folder)
    manifest = load_manifest(folder, verify)
    check_files(folder, manifest, verify)
    if verify and manifest["format_version"] != 2:  # whose files are verified above
        stream(folder, manifest, lambda entries: _dropped, verify)
    loaded = _described_model(folder, manifest)
    for path, variable in variables(loaded.model):
        assign(loaded.model, path, _in_layout(variable.get_value()))
    return loaded


def _dropped(name: str, row: int, block: np.ndarray) -> None:
    """Take a block that is read for its hash alone."""


def _described_model(folder: Path, manifest: dict[str, Any], dtype: Any = None) -> Loaded:
    """The abstract model that a manifest describes, as it is stored."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
    family, config, recipe, hf_config = describe(folder, manifest)
    try:
        model = abstract_model(family, config, recipe, dtype)
    except ValueError as e:
        raise CheckpointError(f"{folder}: config.json and recipe do not fit: {e}") from e
    check_tensors(manifest, abstract_params(model), folder)
    return Loaded(model, config, manifest, family, hf_config)


def describe(
    folder: Path, manifest: dict[str, Any]
) -> tuple[Family, Config, Recipe, dict[str, Any]]:
    """Family, config, recipe and Hugging Face config of a checkpoint folder.

    Raises:
        UserError: config.json or the recipe is not supported.
    """
    hf_config = load_json(folder / CONFIG)
    family = family_for(hf_config, folder / CONFIG)
    config = family.config_from_hf(hf_config)
    recipe = Recipe.from_json(manifest["recipe"], f"{folder}: recipe")
    return family, with_head(config, manifest["tied_head"]), recipe, hf_config


def held_bytes(folder: Path) -> int:
    """Memory of the loaded model on this platform, from JSON files only.

    Raises:
        CheckpointError: see :func:`outline`.
    """
    return parameter_bytes(abstract_params(outline(folder).model))


def model_bytes(model: VLM) -> int:
    """Bytes of an abstract model's tensors in the layout of the platform that is traced for."""
    values = (variable.get_value() for _, variable in variables(model))
    return sum(parameter_bytes({"": _in_layout(value)}) for value in values)


def _in_layout(value: Any) -> Any:
    """An abstract tensor in the layout of the platform that is traced for."""
    # A new function: JAX would reuse its trace of `held` for another platform.
    return jax.eval_shape(lambda w: held(w), value) if isinstance(value, QWeight) else value


def check_tensors(manifest: dict[str, Any], expected: Params, folder: Path) -> None:
    """Check that the manifest's tensors are those of the model.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; the message lists
            them.
    """
    tensors, misfits = manifest["tensors"], []
    for name in sorted(tensors.keys() | expected.keys()):
        found = _described(tensors.get(name))
        wanted = _described(expected.get(name))
        if found != wanted:
            misfits.append(f"tensor {name}: expected {wanted}, found {found}")
    if misfits:
        refuse(folder, [f"{len(misfits)} tensors do not fit config and recipe", *misfits])


def _described(value: Any) -> str:
    """Shape and bits of a manifest entry or an abstract tensor."""
    if value is None:
        return "nothing"
    if isinstance(value, QWeight):
        shape = [*value.values.shape[:-1], value.in_features]
        return f"{shape} of {value.bits} bits in {value.groups} groups"
    if not isinstance(value, dict):
        value = {"shape": list(value.shape), "dtype": value.dtype.name}
    if "bits" in value:
        return f"{value['shape']} of {value['bits']} bits in {value['groups']} groups"
    return f"{value['shape']} of {'integers' if 'int' in value['dtype'] else 'floats'}"


def _converted(value: Any, like: Any, hold: Hold) -> Any:
    """A tensor in the model's dtype; a quantised one in its in-memory layout."""
    return hold(value) if isinstance(value, QWeight) else jnp.asarray(value).astype(like.dtype)


class _Filler:
    """The arrays of a model, and for each stored tensor the array that its rows go to."""

    def __init__(self, model: VLM, manifest: dict[str, Any], hold: Hold):
        self.model, self.manifest, self.hold = model, manifest, hold
        self._places: dict[str, Callable[[int, np.ndarray], None]] = {}
        self._made: list[tuple[tuple[str, ...], Any]] = []
        for path, variable in variables(model):
            like = variable.get_value()
            value = jax.tree.map(lambda x: empty_aligned(x.shape, x.dtype), self._form(like))
            self._made.append((path, value))
            for i, name in enumerate(layer_names(path, like)):
                # The ellipsis makes a layer's scalar a view, too.
                layer = jax.tree.map(lambda x, i=i: x[i, ...], value) if STACK in path else value
                self._add(name, layer)

    def fill(self, folder: Path, verify: Verify) -> None:
        """Read the files, and set the model's arrays."""
        stream(folder, self.manifest, self._sink, verify)
        while self._made:
            path, value = self._made.pop()
            value = jax.tree.map(jax.device_put, value)
            if isinstance(value, QWeight) and self._held(value).storage != value.storage:
                value = self.hold(value)
            assign(self.model, path, value)

    def _form(self, like: Any) -> Any:
        """Shapes of the arrays to fill: the in-memory layout, if files can be read into it."""
        if not isinstance(like, QWeight):
            return like
        form = self._held(like)
        return like if form.storage == "int4" else form

    def _held(self, value: QWeight) -> QWeight:
        """The in-memory layout of a weight, as shapes; one in parts already has it."""
        # A new function each time: JAX would reuse its trace for another platform.
        form = jax.eval_shape(lambda w: self.hold(w), value)
        return value if value.storage == "parts" else form

    def _add(self, name: str, value: Any) -> None:
        stored = stored_names(name, self.manifest["tensors"][name])
        if isinstance(value, QWeight):
            self._places[stored[0]] = lambda row, block: _put_values(value, row, block)
            self._places[stored[1]] = lambda row, block: put_rows(value.scale, row, block)
        else:
            self._places[stored[0]] = lambda row, block: put_rows(value, row, block)

    def _sink(self, entries: Mapping[str, Entry]) -> Sink:
        return lambda name, row, block: self._places[name](row, block)


def _put_values(out: QWeight, row: int, block: np.ndarray) -> None:
    """Write rows of a quantised weight, as stored, into its in-memory layout."""
    rows = slice(row, row + len(block))
    if out.storage == "packed" or (out.storage == "int8" and out.bits == 8):
        out.values[rows] = block
    elif out.storage == "int8":
        unpack_int4(block, out.in_features, out.values[rows])
    else:
        block = unpack_int4(block, out.in_features) if out.bits == 4 else block
        parts = block.reshape(len(block), out.values.shape[0], -1).swapaxes(0, 1)
        out.values[:, rows] = parts
