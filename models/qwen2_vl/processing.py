"""Qwen2-VL: batches of patches and token ids, with M-RoPE positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mquant_jax.errors import PromptError
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.prompts import check_patches, check_prompts
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.nn.vit import VisionInput
from mquant_jax.runtime.buckets import fine

Grid = tuple[int, int, int]
_LONGEST_STEP = 3600.0  # seconds between temporal patches


def patch_coords(h: int, w: int, merge: int) -> np.ndarray:
    """Row and column of each patch of an ``h x w`` grid in merge-block order: ``[h*w, 2]``."""
    rows, cols = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    grid = np.stack([rows, cols], axis=-1)
    blocks = grid.reshape(h // merge, merge, w // merge, merge, 2)
    return blocks.swapaxes(1, 2).reshape(h * w, 2).astype(np.int32)


def pack_vision(patches: np.ndarray, grids: Sequence[Grid], merge: int) -> VisionInput:
    """One row per image or temporal slice, padded to a common bucket of patches.

    Args:
        patches: float32 ``[sum(t*h*w), patch_dim]`` in the order of ``grids``.
        grids: patches per axis, before merging.
    """
    frames = [(h, w) for t, h, w in grids for _ in range(t)]
    width, rows = fine(max(h * w for h, w in frames), merge * merge), fine(len(frames))
    out = np.zeros((rows, width, patches.shape[-1]), np.float32)
    coords = np.zeros((rows, width, 2), np.int32)
    valid = np.zeros((rows, width), bool)
    start = 0
    for i, (h, w) in enumerate(frames):
        n = h * w
        out[i, :n] = patches[start : start + n]
        coords[i, :n] = patch_coords(h, w, merge)
        valid[i, :n] = True
        start += n
    return VisionInput(out, coords, valid)


def visual_rows(grids: Sequence[Grid], merge: int, row_tokens: int) -> list[np.ndarray]:
    """For each grid, the rows of the flattened visual features with its tokens."""
    out, row = [], 0
    for t, h, w in grids:
        n = h * w // merge**2
        slices = [np.arange(n) + (row + k) * row_tokens for k in range(t)]
        out.append(np.concatenate(slices).astype(np.int32))
        row += t
    return out


def _temporal(frames: int, seconds: float, config: Qwen2VLConfig) -> np.ndarray:
    """int32 ``[frames]``: temporal positions of a clip's temporal patches, from 0."""
    index = np.arange(frames, dtype=np.float32)
    if config.tokens_per_second is not None:
        index = np.floor(index * np.float32(seconds) * np.float32(config.tokens_per_second))
    return index.astype(np.int32)


def _checked_seconds(seconds: Sequence[float], grids: Sequence[Grid]) -> Sequence[float]:
    """The time between temporal patches of each grid, checked.

    Raises:
        PromptError: not one number per grid, or a number out of range.
    """
    if not seconds:
        return [1.0] * len(grids)
    if len(seconds) != len(grids) or not all(0 <= s <= _LONGEST_STEP for s in seconds):
        raise PromptError(f"seconds {list(seconds)}: expected one number from 0 to {_LONGEST_STEP} "
                          f"for each of {len(grids)} pictures and clips")  # fmt: skip
    return seconds


def mrope_positions(
    ids: Sequence[int],
    grids: Sequence[Grid],
    config: Qwen2VLConfig,
    seconds: Sequence[float] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Rotary positions of one unpadded row, and the visual grid of each token.

    After a clip, text continues at one past the largest position used (as the models were trained).

    Args:
        seconds: see :class:`~mquant_jax.models.base.Prompt`.

    Returns:
        int32 ``[3, n]``, and int32 ``[n]``: index into ``grids``, -1 for text.

    Raises:
        PromptError: placeholders, grids and ``seconds`` do not match.
    """
    visual = np.isin(ids, (config.image_token_id, config.video_token_id))
    positions = np.zeros((3, len(ids)), np.int32)
    owner = np.full(len(ids), -1, np.int32)
    seconds, at, i, used = _checked_seconds(seconds, grids), 0, 0, 0
    while i < len(ids):
        if not visual[i]:
            positions[:, i] = at
            at, i = at + 1, i + 1
            continue
        if used == len(grids):
            raise PromptError(f"placeholder {i} has no picture: {len(grids)} given")
        t, h, w = grids[used]
        mh, mw = h // config.merge_size, w // config.merge_size
        n = t * mh * mw
        if not visual[i : i + n].all() or i + n > len(ids):
            raise PromptError(f"picture {used} needs {n} consecutive placeholders from token {i}")
        own = np.indices((t, mh, mw)).reshape(3, n)
        own[0] = _temporal(t, seconds[used], config)[own[0]]
        positions[:, i : i + n] = at + own
        owner[i : i + n] = used
        at, i, used = at + int(own.max()) + 1, i + n, used + 1
    if used < len(grids):
        raise PromptError(f"{len(grids)} pictures given, placeholders for {used}")
    return positions, owner


def collate(
    prompts: Sequence[Prompt], config: Qwen2VLConfig, pad_id: int, pad_to: int | None = None
) -> Batch:
    """Left-pad prompts to one length and pack all their pictures.

    Raises:
        PromptError: ids outside the vocabulary, or placeholders that do not match the pictures.
    """
    check_prompts(prompts, config.language.vocab_size)
    check_patches(prompts)
    lengths = [len(p.input_ids) for p in prompts]
    b, t = len(prompts), max(pad_to or 0, *lengths)
    ids = np.full((b, t), pad_id, np.int32)
    order = np.full((b, t), -1, np.int32)
    positions = np.zeros((3, b, t), np.int32)
    token_class = np.full((b, t), -1, np.int32)
    visual_index = np.full((b, t), -1, np.int32)
    grids = [g for p in prompts for g in p.grids]
    vision = None
    if grids:
        vision = pack_vision(np.concatenate([p.patches for p in prompts]), grids, config.merge_size)
        row_tokens = vision.patches.shape[1] // config.merge_size**2
        rows = visual_rows(grids, config.merge_size, row_tokens)
    first = 0
    for i, p in enumerate(prompts):
        n = lengths[i]
        real = slice(t - n, t)
        ids[i, real], order[i, real] = p.input_ids, np.arange(n)
        positions[:, i, real], owner = mrope_positions(p.input_ids, p.grids, config, p.seconds)
        token_class[i, real] = owner >= 0
        if p.grids:
            mine = np.concatenate(rows[first : first + len(p.grids)])
            visual_index[i, real][owner >= 0] = mine
            first += len(p.grids)
    return Batch(ids, order, positions, token_class, visual_index, vision)


def reference_prompts(inputs: dict[str, Any], config: Qwen2VLConfig) -> Iterator[Prompt]:
    """The rows of a golden's inputs (transformers' own argument names) as prompts."""
    kinds = {
        config.image_token_id: ("pixel_values", "image_grid_thw"),
        config.video_token_id: ("pixel_values_videos", "video_grid_thw"),
    }
    queues = {}
    for token, (pixels, shapes) in kinds.items():
        if pixels in inputs:
            sizes = np.prod(inputs[shapes], axis=1)
            parts = np.split(inputs[pixels], np.cumsum(sizes)[:-1])
            grids = [(int(t), int(h), int(w)) for t, h, w in inputs[shapes]]
            steps = [1.0] * len(grids)
            if token == config.video_token_id:
                steps = [float(s) for s in inputs.get("second_per_grid_ts", steps)]
            queues[token] = iter(list(zip(grids, parts, steps, strict=True)))
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask == 1].tolist()
        pictures = []
        i = 0
        while i < len(ids):
            if ids[i] in queues:
                pictures.append(next(queues[ids[i]]))
                i += int(np.prod(pictures[-1][0])) // config.merge_size**2
            else:
                i += 1
        empty = np.zeros((0, config.vision.patch_dim), np.float32)
        patches = np.concatenate([empty, *(part for _, part, _ in pictures)])
        yield Prompt(ids, [g for g, _, _ in pictures], patches, [s for _, _, s in pictures])


def reference_batch(config: Qwen2VLConfig, inputs: dict[str, np.ndarray]) -> Batch:
    """A golden's inputs as one batch of equal padded length."""
    prompts = list(reference_prompts(inputs, config))
    return collate(prompts, config, pad_id=0, pad_to=inputs["input_ids"].shape[1])


def example_prompt(config: Qwen2VLConfig, text_tokens: int, side: int) -> Prompt:
    """Arbitrary tokens and one noise picture of ``side`` pixels (0: none), for measurements."""
    rng = np.random.default_rng(0)
    special = min(config.image_token_id, config.video_token_id, config.vision_start_token_id)
    text = rng.integers(0, special, text_tokens).tolist()
    if side == 0:
        return Prompt(text, [], np.zeros((0, config.vision.patch_dim), np.float32))
    unit = config.patch_size * config.merge_size
    edge = max(1, round(side / unit)) * config.merge_size
    patches = rng.standard_normal((edge * edge, config.vision.patch_dim), np.float32)
    visual = [config.image_token_id] * (edge // config.merge_size) ** 2
    half = text_tokens // 2
    return Prompt([*text[:half], *visual, *text[half:]], [(1, edge, edge)], patches)
