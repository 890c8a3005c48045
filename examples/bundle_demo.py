"""Put a trained demo model and its data sets into the package.

    python -m examples.bundle_demo EXPORTED_FOLDER

Copies the Hugging Face folder written by ``examples.train_demo --export`` to
``mquant_jax/assets/demo/model``. Draws the calibration set (64 samples from the training split) and
the held-out evaluation set (500 questions about strings and scenes never used in training) beside
it. The sets depend only on the seeds in this file.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from examples import demo_tasks
from mquant_jax.samples import BUNDLED_CALIBRATION, BUNDLED_HELDOUT, DEMO_ASSETS, Sample
from mquant_jax.samples import write_samples as write

CALIBRATION, HELD_OUT = 64, 500
LIMIT = 16 * 2**20  # the bundle's largest size in bytes


def samples(drawn: list[demo_tasks.Sample]) -> list[Sample]:
    return [Sample((s.image,), s.question, s.answer, s.task) for s in drawn]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.bundle_demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("exported", type=Path, help="folder written by train_demo --export")
    args = parser.parse_args()
    if not (args.exported / "model.safetensors").is_file():
        parser.error(f"{args.exported} has no model.safetensors; export with train_demo --export")
    model = DEMO_ASSETS / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(args.exported, model)
    # Seeds other than those of training (0) and its progress checks (1).
    write(BUNDLED_CALIBRATION, samples(demo_tasks.calibration_set(CALIBRATION, seed=2)))
    write(BUNDLED_HELDOUT, samples(demo_tasks.eval_set(HELD_OUT, seed=3)))
    size = sum(p.stat().st_size for p in DEMO_ASSETS.rglob("*") if p.is_file())
    print(f"{DEMO_ASSETS}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        parser.error(f"the bundle is larger than {LIMIT / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
