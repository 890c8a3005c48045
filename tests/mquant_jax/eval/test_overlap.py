"""Overlap of calibration and evaluation data, in pictures and questions."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from mquant_jax.eval.overlap import Fingerprints, calibration_of
from mquant_jax.eval.tasks.plain import questions_from
from mquant_jax.models.images import load_image
from mquant_jax.ptq.fingerprints import calibration_fingerprints, near, picture_hash, question_hash
from mquant_jax.samples import BUNDLED_CALIBRATION, BUNDLED_HELDOUT, Sample, read_samples


def again(image, scale=1.5) -> bytes:
    """The picture, resized and JPEG-encoded."""
    picture, out = load_image(image, "x"), io.BytesIO()
    size = [round(side * scale) for side in picture.size]
    picture.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=80)
    return out.getvalue()


@pytest.fixture(scope="module")
def known():
    return calibration_fingerprints(None, None)


def test_the_bundled_sets_do_not_overlap_in_pictures(known) -> None:
    found = Fingerprints(questions_from(read_samples(BUNDLED_HELDOUT))).overlap(known)
    assert found["pictures"] == found["both"] == 0 < found["questions"]


def test_pictures_are_found_again(known) -> None:
    samples = read_samples(BUNDLED_CALIBRATION)
    copies = [Sample((again(s.images[0]),), f"  {s.question.upper()} ") for s in samples]
    found = Fingerprints(questions_from(copies)).overlap(known)
    assert found["pictures"] >= 0.9 * len(samples)
    assert found["questions"] == len(samples) and found["both"] == found["pictures"]
    alike = Fingerprints(questions_from(samples)).overlap(known)
    assert alike == {"pictures": 64, "questions": 64, "both": 64}


def test_hashes_by_hand() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (60, 80, 3)).astype(np.uint8) for _ in range(2))
    one, other = picture_hash(a, "a"), picture_hash(b, "b")
    assert len(one) == 64 and near([one, other], [one]) == [True, False]
    assert near([one], []) == [False] and near([], [one]) == []
    assert question_hash("What  IS it?\n") == question_hash("what is it?") != question_hash("who?")
    plain = picture_hash(np.zeros((5, 5, 3), np.uint8), "black")
    assert near([plain], [one]) == [False]


def test_text_alone_and_old_checkpoints(known, tmp_path) -> None:
    found = Fingerprints(questions_from([Sample((), "?")])).overlap(known)
    assert found == {"pictures": 0, "questions": 0, "both": 0}
    assert calibration_of(tmp_path) is None
    for report in (
        {},
        {"calibration": 3},
        {"calibration": {"pictures": []}},
        {"calibration": {"pictures": ["zz"], "questions": []}},
    ):
        (tmp_path / "report.json").write_text(json.dumps(report))
        assert calibration_of(tmp_path) is None
    (tmp_path / "report.json").write_text(json.dumps({"calibration": known}))
    assert calibration_of(tmp_path) == known
