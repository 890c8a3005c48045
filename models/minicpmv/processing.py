"""MiniCPM-V: turn slices into rows of patches with positions, and token ids into batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mquant_jax.errors import PromptError
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.minicpmv.config import MiniCPMVConfig
from mquant_jax.models.minicpmv.slices import Slicing
from mquant_jax.models.prompts import check_prompts
from mquant_jax.models.text import collate as collate_text
from mquant_jax.nn.vit import VisionInput
from mquant_jax.runtime.buckets import fine

VISUAL = -1  # placeholder of a visual token; texts may contain any id of the vocabulary
MASKED = 0  # the published code treats this id as padding everywhere, so "!" is never attended to
_LANES, _UNROLLED = 8, 2  # vector width and unrolling of the loop that made the published positions


def _ramp(start: float, step: float, n: int) -> np.ndarray:
    """Return float32 ``start + i * step`` for ``i < n``, rounded as by PyTorch's vectorised arange.

    Full runs of lanes start at a rounded value and continue from there; the rest is computed one by
    one. The last bit decides on which side of a boundary a patch falls.
    """
    i = np.arange(n)
    first = np.where(i < n - n % (_LANES * _UNROLLED), i // _LANES * _LANES, i)
    begin = (start + step * first).astype(np.float32).astype(np.float64)
    return (begin + (i - first) * step).astype(np.float32)


def position_buckets(n: int, grid: int) -> np.ndarray:
    """Return int32 ``[n]``: the index of each of ``n`` patches along a side on a side of ``grid``.

    Equal to ``floor(i * grid / n)``, except for a few exact ties that rounding puts one lower.
    """
    step = float(np.float32(1) / np.float32(n))
    boundaries = _ramp(1 / grid, 1 / grid, grid - 1)
    return np.searchsorted(boundaries, _ramp(0.0, step, n), side="right").astype(np.int32)


def pack_vision(patches: np.ndarray, sizes: Sequence[tuple[int, int]], grid: int) -> VisionInput:
    """One row per slice, padded to a common bucket of patches and a bucket of slices.

    Args:
        patches: float32 ``[sum(h * w), patch_dim]`` in the order of ``sizes``.
        sizes: rows and columns of patches of each slice.
        grid: side of the table of learned positions.
    """
    width, rows = fine(max(h * w for h, w in sizes)), fine(len(sizes))
    out = np.zeros((rows, width, patches.shape[-1]), np.float32)
    coords = np.zeros((rows, width, 2), np.int32)
    valid = np.zeros((rows, width), bool)
    table_rows = np.zeros((rows, width), np.int32)
    start = 0
    for i, (h, w) in enumerate(sizes):
        n = h * w
        out[i, :n] = patches[start : start + n]
        coords[i, :n] = np.indices((h, w)).reshape(2, n).T
        valid[i, :n] = True
        down, across = position_buckets(h, grid), position_buckets(w, grid)
        table_rows[i, :n] = (down[:, None] * grid + across).reshape(n)
        start += n
    return VisionInput(out, coords, valid, table_rows)


def collate(config: MiniCPMVConfig, prompts: Sequence[Prompt], pad_to: int | None = None) -> Batch:
    """Left-pad prompts to one length and pack all their slices.

    A grid ``(1, h, w)`` of a prompt is a slice. Tokens of id 0 are masked everywhere, as in the
    published code: no other token attends to them and they take no position. But if one is last,
    the next token is predicted from it.

    Raises:
        PromptError: ids outside the vocabulary, or placeholders that do not match the slices.
    """
    check_prompts(prompts, config.language.vocab_size, VISUAL)
    for i, p in enumerate(prompts):
        wanted, found = len(p.grids) * config.queries, p.input_ids.count(VISUAL)
        if wanted != found:
            raise PromptError(f"prompt {i}: {found} placeholders, but {wanted} visual tokens")
    batch = collate_text(prompts, MASKED, pad_to)
    real, visual = batch.input_ids != MASKED, batch.input_ids == VISUAL
    order = np.cumsum(real, axis=1, dtype=np.int32) - 1
    index = batch.visual_index.copy()
    index[visual] = np.arange(
        np.count_nonzero(visual)
    )  # slices are in the order of their placeholders
    sizes = [grid[1:] for p in prompts for grid in p.grids]
    vision = None
    if sizes:
        patches = np.concatenate([p.patches for p in prompts if p.grids])
        vision = pack_vision(patches, sizes, config.vision.position_grid)
    return dataclasses.replace(
        batch,
        input_ids=np.where(visual, MASKED, batch.input_ids).astype(np.int32),
        order=order,
        positions=np.where(real, order, 1)[None],
        token_class=np.where(real, visual, -1).astype(np.int32),
        visual_index=index,
        vision=vision,
    )


def unpack(pixels: np.ndarray) -> np.ndarray:
    """A slice as published, ``[3, p, p * n]``, patches side by side -> ``[n, 3 * p * p]``."""
    channels, p, _ = pixels.shape
    x = pixels.reshape(channels, p, -1, p).transpose(2, 0, 1, 3)
    return x.reshape(len(x), channels * p * p)


def reference_prompts(inputs: dict[str, Any], config: MiniCPMVConfig) -> Iterator[Prompt]:
    """The rows of a golden's inputs as prompts, without the leading padding."""
    ids, at = inputs["input_ids"], 0
    bounds = inputs.get("image_bound", np.zeros((0, 2), int))
    counts = inputs.get("slices_per_row", np.zeros(len(ids), int))
    if sum(counts) != len(bounds):
        raise ValueError(f"image_bound has {len(bounds)} slices, slices_per_row has {sum(counts)}")
    for row, count in zip(ids, counts, strict=True):
        row, grids, patches = row.copy(), [], []
        for i in range(at, at + count):
            start, end = bounds[i]
            row[start:end] = VISUAL
            h, w = (int(n) for n in inputs["tgt_sizes"][i])
            grids.append((1, h, w))
            patches.append(unpack(inputs[f"pixel_values_{i}"]))
        at += count
        first = int(np.argmax(row != MASKED))
        empty = np.zeros((0, config.vision.patch_dim), np.float32)
        yield Prompt(row[first:].tolist(), grids, np.concatenate([empty, *patches]))


def reference_batch(config: MiniCPMVConfig, inputs: dict[str, np.ndarray]) -> Batch:
    """A golden's inputs as one batch of equal padded length."""
    prompts = list(reference_prompts(inputs, config))
    return collate(config, prompts, pad_to=inputs["input_ids"].shape[1])


def example_prompt(config: MiniCPMVConfig, text_tokens: int, side: int) -> Prompt:
    """Arbitrary tokens and one noise picture of ``side`` pixels, sliced; 0: no picture."""
    rng = np.random.default_rng(0)
    text = rng.integers(1, config.language.vocab_size, text_tokens).tolist()
    if side == 0:
        return Prompt(text, [], np.zeros((0, config.vision.patch_dim), np.float32))
    p = config.patch_size
    whole, grid, size = Slicing(config.scale_size, p, config.max_slices).plan(side, side)
    sizes = [whole] + ([size] * (grid[0] * grid[1]) if grid and size else [])
    grids = [(1, h // p, w // p) for w, h in sizes]
    total = sum(h * w for _, h, w in grids)
    patches = rng.standard_normal((total, config.vision.patch_dim), np.float32)
    half = text_tokens // 2
    ids = [*text[:half], *[VISUAL] * (config.queries * len(grids)), *text[half:]]
    return Prompt(ids, grids, patches)
