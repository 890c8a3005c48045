"""Calibration samples as prompts with their answers."""

from __future__ import annotations

from pathlib import Path

from mquant_jax.errors import UserError
from mquant_jax.models.base import Processor, Prompt
from mquant_jax.samples import BUNDLED_CALIBRATION, Sample, each, read_samples


def load_calibration(
    path: Path | None, processor: Processor, limit: int | None = None, pictures: bool = True
) -> list[Prompt]:
    """The samples of a JSONL file, or of the bundled set, ready to be collated.

    Args:
        pictures: the model takes pictures; language models alone cannot use the bundled set.

    Raises:
        UserError: unreadable data; no picture in all of it, for a model that takes them (text
            alone would leave the visual scales without evidence); no file for one that does not.
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
    return each(samples, lambda sample: with_answer(sample, processor))


def with_answer(sample: Sample, processor: Processor) -> Prompt:
    """The prompt followed by its answer: decoding steps belong to what is calibrated."""
    return processor.continued(sample.prompt(processor), sample.answer)
