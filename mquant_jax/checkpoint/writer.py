"""Write a checkpoint folder part by part; the manifest comes last."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mquant_jax import __version__
from mquant_jax.checkpoint.manifest import (
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    PARAMS,
    REPORT,
    content_hash,
    json_bytes,
)
from mquant_jax.checkpoint.tensor_file import TensorFileWriter, file_hash, sync_folder
from mquant_jax.checkpoint.workspace import workspace
from mquant_jax.errors import UserError
from mquant_jax.nn.params import STACK, Params, parameter_bytes
from mquant_jax.numerics import QWeight
from mquant_jax.recipe import Recipe

VALUES, SCALE, SUFFIX = "values", "scale", ".safetensors"
_CHECKED = 1 << 20  # values checked at a time


@dataclasses.dataclass(frozen=True)
class Rows:
    """A large table, delivered as successive blocks of its rows.

    Attributes:
        shape: shape of the whole table; ``(out, in)`` if quantised.
        blocks: arrays of ``dtype``, or :class:`QWeight` row blocks where ``bits`` is given.
        dtype: dtype of a float table.
        bits: bits of a quantised table, 4 or 8.
        groups: scales per row of a quantised table.
    """

    shape: tuple[int, ...]
    blocks: Iterable[Any]
    dtype: Any = None
    bits: int | None = None
    groups: int = 1


def part_of(name: str) -> str:
    """Return the part that holds a tensor: its path up to the layer number, else two components.

    ``language/layers/3/q_proj/kernel`` is in ``language.layers.3``, ``vision/merger/fc1/kernel`` in
    ``vision.merger``, ``language/embedding`` in ``language.embedding``.
    """
    path = name.split("/")
    at = path.index(STACK) + 2 if STACK in path else 2
    return ".".join(path[:at])


def by_part(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group tensors by part, in the order in which parts first appear."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in params.items():
        parts.setdefault(part_of(name), {})[name] = value
    return parts


def save(
    dst: str | Path,
    params: Params,
    *,
    family: str,
    hf_config: dict[str, Any],
    recipe: Recipe,
    tied_head: bool,
    files: Sequence[Path] = (),
    report: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a whole checkpoint folder and return its manifest; after a failure DST is unchanged.

    Args:
        params: name -> array or :class:`QWeight` (stored packed when 4-bit), layers separate.
        files, report, source: see :meth:`CheckpointWriter.finish`.

    Raises:
        UserError: DST exists (without ``overwrite``), is not a checkpoint, or cannot be written;
            not enough space; a tensor holds NaN or Inf.
    """
    with workspace(dst, MANIFEST, overwrite=overwrite) as work:
        work.require(parameter_bytes(params))
        writer = CheckpointWriter(work.result)
        records = [writer.write_part(part, tensors) for part, tensors in by_part(params).items()]
        manifest = writer.finish(
            records, family=family, hf_config=hf_config, recipe=recipe, tied_head=tied_head,
            files=files, report=report, source=source,
        )  # fmt: skip
        work.publish()
    return manifest


class CheckpointWriter:
    """Fills a folder with the files of a checkpoint.

    Attributes:
        folder: the folder, which must exist.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        (self.folder / PARAMS).mkdir(exist_ok=True)

    def write_part(self, part: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Write the file of one part; it is on the disk on return.

        Args:
            tensors: name -> array, :class:`QWeight` or :class:`Rows`.

        Returns:
            The JSON record that :meth:`finish` takes: ``{"part", "file", "bytes", "sha256",
            "tensors": {name: manifest entry}}``.

        Raises:
            UserError: a tensor holds NaN or Inf, or a scale that is not positive.
            OSError: for example a full disk; the file is removed.
        """
        tables = {name: _as_rows(value) for name, value in sorted(tensors.items())}
        specs: dict[str, Any] = {}
        for name, rows in tables.items():
            specs.update(_stored(name, rows))
        file = f"{PARAMS}/{part}{SUFFIX}"
        with TensorFileWriter(self.folder / file, specs) as out:
            for name, rows in tables.items():
                _write_rows(out, name, rows)
        hashes = out.record["tensors"]
        entries = {name: {**_entry(name, rows, hashes), "part": part}
                   for name, rows in tables.items()}  # fmt: skip
        digest = {"bytes": out.record["bytes"], "sha256": out.record["sha256"]}
        return {"part": part, "file": file, **digest, "tensors": entries}

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Return whether the file of an earlier :meth:`write_part` exists and is unchanged."""
        path = self.folder / record["file"]
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            return False
        return file_hash(path)["sha256"] == record["sha256"]

    def finish(
        self,
        records: Iterable[Mapping[str, Any]],
        *,
        family: str,
        hf_config: dict[str, Any],
        recipe: Recipe,
        tied_head: bool,
        files: Sequence[Path] = (),
        report: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
        calibration: str | None = None,
    ) -> dict[str, Any]:
        """Write everything but the tensors, the manifest last.

        Args:
            records: what :meth:`write_part` returned, for all parts.
            hf_config: the Hugging Face config; a config.json among ``files`` takes precedence.
            files: copied into the folder under their names.
            report: the quantisation report, stored as report.json.
            source: file name -> ``{"bytes", "sha256"}`` of the converted model.
            calibration: fingerprint of the calibration prompts.

        Returns:
            The manifest.

        Raises:
            OSError: a file cannot be read or written.
        """
        records = list(records)
        self._remove_others({r["file"] for r in records})
        side = {CONFIG: json_bytes(hf_config)}
        side |= {} if report is None else {REPORT: json_bytes(report)}
        side |= {file.name: file.read_bytes() for file in files}
        manifest = {
            "format_version": FORMAT_VERSION,
            "mquant_jax": __version__,
            "family": family,
            "tied_head": tied_head,
            "recipe": recipe.to_json(),
            **_tables(records),
            "files": {name: self._write(name, data) for name, data in side.items()},
            "source": source or {},
            "calibration": calibration,
        }
        manifest["sha256"] = content_hash(manifest)
        self._write(MANIFEST, json_bytes(manifest))
        sync_folder(self.folder)
        return manifest

    def _remove_others(self, wanted: set[str]) -> None:
        """Remove files left by a stopped conversion that this one did not write again."""
        for path in (self.folder / PARAMS).iterdir():
            if f"{PARAMS}/{path.name}" not in wanted:
                path.unlink()

    def _write(self, name: str, data: bytes) -> dict[str, Any]:
        path = self.folder / name
        with path.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        return file_hash(path)


def _as_rows(value: Any) -> Rows:
    """Return any value as blocks of rows; a whole array is one block."""
    if isinstance(value, Rows):
        return value
    if isinstance(value, QWeight):
        shape = (*value.values.shape[:-1], value.in_features)
        if value.storage == "parts":
            shape = (value.out_features, value.in_features)
        return Rows(shape, [value], bits=value.bits, groups=value.groups)
    array = np.asarray(value)
    return Rows(array.shape, [array], dtype=array.dtype)


def _stored(name: str, rows: Rows) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the stored tensors of one of ours: name -> (shape, dtype)."""
    if rows.bits is None:
        return {name: (rows.shape, rows.dtype)}
    *lead, columns = rows.shape
    packed = rows.bits == 4
    values = ((*lead, (columns + 1) // 2 if packed else columns), np.uint8 if packed else np.int8)
    return {
        f"{name}/{VALUES}": values,
        f"{name}/{SCALE}": ((*lead, rows.groups), np.float32),
    }


def _write_rows(out: TensorFileWriter, name: str, rows: Rows) -> None:
    if rows.bits is None:
        for block in rows.blocks:
            block = np.asarray(block)
            check_finite(block, name)
            out.write(name, block)
        return
    scales = []
    for block in rows.blocks:
        block = jax.tree.map(np.asarray, block.packed())
        block = block if rows.bits == 4 else block.unpacked()
        check_scale(block.scale, name)
        out.write(f"{name}/{VALUES}", block.values)
        scales.append(block.scale)
    for scale in scales:
        out.write(f"{name}/{SCALE}", scale)


def _entry(name: str, rows: Rows, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return a tensor's manifest entry; ``shape`` is the weight's, not its packed form's."""
    stored = _stored(name, rows).values()
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in stored)
    entry = {"shape": list(rows.shape), "bytes": size}
    if rows.bits is None:
        return {**entry, "dtype": np.dtype(rows.dtype).name, "sha256": hashes[name]}
    return {
        **entry,
        "dtype": f"int{rows.bits}",
        "in_features": rows.shape[-1],
        "bits": rows.bits,
        "groups": rows.groups,
        "sha256": hashes[f"{name}/{VALUES}"],
        "scale_sha256": hashes[f"{name}/{SCALE}"],
    }


def _tables(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for record in records:
        tensors.update(record["tensors"])
    counts: Counter[str] = Counter()
    for entry in tensors.values():
        counts[entry["dtype"]] += math.prod(entry["shape"])
    return {
        "total_bytes": sum(e["bytes"] for e in tensors.values()),
        "dtype_counts": dict(counts),
        "tensors": dict(sorted(tensors.items())),
        "parts": {r["part"]: {k: r[k] for k in ("file", "bytes", "sha256")} for r in records},
    }


def check_finite(array: np.ndarray, name: str) -> None:
    """
    Raises:
        UserError: a float tensor holds NaN or Inf.
    """
    if array.dtype.kind in "iub":
        return
    bad = sum(b.size - int(np.count_nonzero(np.isfinite(b))) for b in _pieces(array))
    if bad:
        raise UserError(f"tensor {name}: {bad} of {array.size} values are NaN or Inf; not written")


def check_scale(scale: np.ndarray, name: str) -> None:
    """
    Raises:
        UserError: a weight scale is NaN, Inf, zero or negative.
    """
    good = np.isfinite(scale) & (scale > 0)
    if not good.all():
        bad = scale.size - int(np.count_nonzero(good))
        raise UserError(
            f"tensor {name}: {bad} of {scale.size} weight scales are not positive numbers; "
            "not written"
        )


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = np.ascontiguousarray(array).reshape(-1)
    return (flat[i : i + _CHECKED] for i in range(0, flat.size, _CHECKED))
