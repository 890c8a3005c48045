"""Load calibration samples as prompts with their answers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mquant_jax.cli_support import warn
from mquant_jax.errors import UserError
from mquant_jax.files import read_json
from mquant_jax.models.base import Batch, Processor, Prompt
from mquant_jax.nn.act_quant import TEXT
from mquant_jax.numerics import QWeight
from mquant_jax.ptq.fingerprints import REPORTED, calibration_fingerprints
from mquant_jax.ptq.states import States, loaded
from mquant_jax.recipe import Recipe
from mquant_jax.runtime.buckets import fine
from mquant_jax.samples import BUNDLED_CALIBRATION, DEMO_ASSETS, Sample, each, read_samples
from mquant_jax.sections import kind_of

CHUNK_TOKENS = 4096  # tokens or patches per batch
LEARNING_TOKENS = 4096  # text tokens to learn scales from; fewer are warned of


def load_calibration(
    path: Path | None,
    processor: Processor,
    limit: int | None = None,
    pictures: bool = True,
    keep: Callable[[Prompt], Prompt] = lambda prompt: prompt,
) -> list[Prompt]:
    """Load the samples of a JSONL file, or of the bundled set, ready to be collated.

    Args:
        pictures: whether the model takes pictures; language models cannot use the bundled set.
        keep: what to keep of each prompt.

    Raises:
        UserError: the data cannot be read; a model that takes pictures got none at all, so that
            nothing would determine its visual scales; no file for a model that takes none.
    """
    if path is None and not pictures:
        raise UserError(
            "this recipe needs calibration text: pass --calibration FILE.jsonl with lines "
            '{"question": ..., "answer": ...}; the bundled set is about pictures'
        )
    samples = read_samples(path or BUNDLED_CALIBRATION, limit)
    if pictures and not any(s.images for s in samples):
        raise UserError(
            f"{path or BUNDLED_CALIBRATION}: no sample has a picture; a multimodal model "
            "calibrated on text alone loses its visual accuracy, so add samples with images"
        )
    return each(samples, lambda sample: keep(with_answer(sample, processor)))


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Calibration prompts in batches that run together; their patches are stored.

    Attributes:
        batches: the prompts.
        fingerprint: a hash of all prompts.
        samples: number of prompts.
        tokens: number of tokens, without padding.
        patches: number of patches, without padding.
        contents: their record in a checkpoint's report, see :mod:`mquant_jax.ptq.fingerprints`.
    """

    batches: list[Batch]
    fingerprint: str
    samples: int
    tokens: int
    patches: int
    contents: dict[str, Any] = dataclasses.field(default_factory=dict)


def calibration_chunks(
    path: Path | None,
    processor: Processor,
    states: States,
    limit: int | None = None,
    pictures: bool = True,
) -> Chunks:
    """Load the samples of a JSONL file, or of the bundled set, in batches of a few thousand tokens.

    All patches together may not fit in memory, so ``states`` keeps them.

    Raises:
        UserError: see :func:`load_calibration`.
    """
    whole = states.spool()

    def keep(prompt: Prompt) -> Prompt:
        stored: Any = whole.append(prompt.patches)  # loaded again batch by batch
        return dataclasses.replace(prompt, patches=stored)

    chunks = chunked(load_calibration(path, processor, limit, pictures, keep), processor, states)
    whole.clear()
    return dataclasses.replace(chunks, contents={REPORTED: calibration_fingerprints(path, limit)})


def chunked(prompts: Sequence[Prompt], processor: Processor, states: States) -> Chunks:
    """Group prompts, whose patches may be stored, into batches of a few thousand tokens."""
    packed, digest, batches, tokens, patches = states.spool(), hashlib.sha256(), [], 0, 0
    for group in grouped(prompts):
        group = [dataclasses.replace(p, patches=loaded(p.patches)) for p in group]
        batch = processor.collate(group, pad_to=fine(max(len(p.input_ids) for p in group), 64))
        for leaf in jax.tree.leaves(batch):
            digest.update(np.ascontiguousarray(leaf).data)
        if batch.vision is not None:
            patches += int(np.asarray(batch.vision.valid).sum())
            stored: Any = packed.append(batch.vision.patches)
            vision = dataclasses.replace(batch.vision, patches=stored)
            batch = dataclasses.replace(batch, vision=vision)
        batches.append(batch)
        tokens += int((np.asarray(batch.token_class) >= 0).sum())
    return Chunks(batches, digest.hexdigest(), len(prompts), tokens, patches)


def warn_of_few(chunks: Chunks, layers: Mapping[str, Any], recipe: Recipe) -> None:
    """Warn where GPTQ has fewer rows than a layer has inputs.

    The Hessian is then singular, and damping determines the missing directions.

    Args:
        layers: path of each dense layer -> its weight (``QWeight`` where it is quantised).
    """
    if recipe.weights.method != "gptq":
        return
    for stack, kind, count in (
        ("language/layers/", "tokens", chunks.tokens),
        ("vision/", "patches", chunks.patches),
    ):
        widths = {
            path: w.in_features
            for path, w in layers.items()
            if path.startswith(stack) and isinstance(w, QWeight)
        }
        widest = max(widths, key=widths.__getitem__, default=None)
        if widest is not None and count < widths[widest]:
            more = -(-widths[widest] * chunks.samples // max(count, 1))
            warn(
                f"calibration has {count} {kind} in {chunks.samples} samples, fewer than the "
                f"{widths[widest]} inputs of {kind_of(widest)}; {more} samples like these suffice",
                "calibration",
            )


def warn_of_little_text(chunks: Chunks, recipe: Recipe) -> None:
    """Warn where scales are learned from few predictions.

    A language model of 135M parameters gained from 8192 text tokens. From 1101, in groups of 64, it
    lost (docs/accuracy.md).
    """
    if not recipe.learns_whole:
        return
    text = sum(int((np.asarray(b.token_class) == TEXT).sum()) for b in chunks.batches)
    if text < LEARNING_TOKENS:
        warn(
            f"recipe {recipe.name!r} learns scales from text, and calibration has {text} text "
            f"tokens in {chunks.samples} samples; below {LEARNING_TOKENS} they may fit the samples "
            "and nothing else: give more or longer ones, or take w4a8, which does not learn",
            "calibration",
        )


def warn_of_bundled(folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Warn that the bundled pictures are used for another model than the demo."""
    if hf_config != read_json(DEMO_ASSETS / "model" / "config.json"):
        warn(
            f"NO --calibration FOR {folder}: the bundled samples are drawn shapes that the demo "
            "model was trained on, and this is another model; its scales and weights will suit "
            "neither photos nor text. Pass --calibration FILE.jsonl with samples of your own use",
            "calibration",
        )


def grouped(prompts: Sequence[Prompt], most: int = CHUNK_TOKENS) -> Iterator[list[Prompt]]:
    """Group successive prompts whose tokens, or patches, padded to one length are at most
    ``most``."""
    group: list[Prompt] = []
    for prompt in prompts:
        if group and _size([*group, prompt]) > most:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def _size(prompts: Sequence[Prompt]) -> int:
    """Return padded tokens or patches, whichever are more."""
    tokens = len(prompts) * max(len(p.input_ids) for p in prompts)
    pictures = [h * w for p in prompts for t, h, w in p.grids for _ in range(t)]
    return max(tokens, len(pictures) * max(pictures, default=0))


def with_answer(sample: Sample, processor: Processor) -> Prompt:
    """Return the prompt followed by its answer, so that decoding steps are calibrated too."""
    return processor.continued(sample.prompt(processor), sample.answer)
