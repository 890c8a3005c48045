"""The JSONL format of calibration and evaluation data."""

import numpy as np
import pytest
from PIL import Image

from mquant_jax.errors import UserError
from mquant_jax.samples import Sample, read_samples, write_samples


def test_round_trip(tmp_path) -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample((rng.integers(0, 256, (8, 8, 3), np.uint8),), f"q{i}", f"a{i}", "t")
        for i in range(3)
    ]
    write_samples(tmp_path / "set.jsonl", samples)
    back = read_samples(tmp_path / "set.jsonl")
    assert [(s.question, s.answer, s.task) for s in back] == [
        ("q0", "a0", "t"), ("q1", "a1", "t"), ("q2", "a2", "t")
    ]  # fmt: skip
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(samples, back, strict=True))
    assert len(read_samples(tmp_path / "set.jsonl", limit=2)) == 2


def test_paths_are_relative_to_the_file(tmp_path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "s.jsonl").write_text('{"images": ["a.png", "a.png"], "question": "same?"}\n\n')
    (sample,) = read_samples(tmp_path / "s.jsonl")
    assert sample.images == (tmp_path / "a.png",) * 2 and sample.answer == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"image": "a.png"}', "expected an object"),
        ('{"image": "a.png", "question": "?"}', "no such picture"),
        ('{"image": 3, "question": "?"}', "neither a path nor a row"),
        ('{"question": "?", "imgae": "x"}', "unknown key 'imgae'"),
        ("", "holds no samples"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        read_samples(path)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_samples(tmp_path / "none.jsonl")
