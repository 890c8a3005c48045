"""Calibration samples as prompts with their answers."""

from __future__ import annotations

from pathlib import Path

from models.base import Processor, Prompt
from mquant_jax.errors import UserError
from mquant_jax.samples import BUNDLED_CALIBRATION, Sample, read_samples


def load_calibration(
    path: Path | None, processor: Processor, limit: int | None = None
) -> list[Prompt]:
    """The samples of a JSONL file, or of the bundled set, ready to be collated.

    Raises:
        UserError: unreadable data, or no picture in all of it (text alone would leave the visual
            scales without evidence).
    """
    samples = read_samples(path or BUNDLED_CALIBRATION, limit)
    if not any(s.images for s in samples):
        raise UserError(
            f"{path}: no sample has a picture; a multimodal model calibrated on text alone "
            "loses its visual accuracy, so add samples with images"
        )
    return [with_answer(s, processor) for s in samples]


def with_answer(sample: Sample, processor: Processor) -> Prompt:
    """The prompt followed by its answer: decoding steps belong to what is calibrated."""
    prompt = processor.prompt(sample.question, sample.images)
    ids = [*prompt.input_ids, *processor.encode(sample.answer)]
    return Prompt(ids, prompt.grids, prompt.patches)
