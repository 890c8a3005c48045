"""Write the questions that the llava bed asks, and those that it calibrates with.

    python -m examples.bundle_llava OUT --emoji EMOJI

writes ``OUT/evaluation.jsonl``, ``OUT/calibration.jsonl`` and their pictures as PNG files. The sets
depend only on the seeds in this file. Evaluation pictures are of the held-out split, calibration
pictures of the training split; EMOJI is as in ``examples.train_llava``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from examples.llava_pictures import Picture, pictures_of

EVALUATION = {"easyvqa": 110, "scene": 60, "count": 30, "text": 30, "emoji": 105}
CALIBRATION = {"easyvqa": 28, "scene": 14, "count": 4, "text": 4, "emoji": 14}
SEED = 7  # training draws with 0


def task(picture: Picture, answer: str) -> str:
    """Kind of picture; yes-or-no questions separately."""
    return picture.kind + (" yes/no" if answer in ("yes", "no") else "")


def write(out: Path, name: str, drawn: Sequence[Picture], most: int) -> int:
    """Write ``name.jsonl`` and the pictures; of each picture at most so many questions.

    Returns:
        The number of questions.
    """
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, picture in enumerate(drawn):
        file = folder / f"{i:03}.png"
        Image.fromarray(picture.image).save(file, optimize=True)
        # Calibration, with one question of each picture, takes them in turn.
        first = i % len(picture.questions) if most == 1 else 0
        for question, answer in picture.questions[first : first + most]:
            row = {"image": f"{name}/{file.name}", "question": question, "answer": answer}
            lines.append(json.dumps(row | {"task": task(picture, answer)}))
    (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.bundle_llava",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--emoji", type=Path, required=True, help="the unpacked npm package")
    args = parser.parse_args()
    for name, split, counts, most in (
        ("evaluation", "heldout", EVALUATION, 16),
        ("calibration", "train", CALIBRATION, 1),
    ):
        n = write(args.out, name, pictures_of(counts, split, SEED, args.emoji), most)
        print(f"{name}: {n} questions about {sum(counts.values())} pictures")


if __name__ == "__main__":
    main()
