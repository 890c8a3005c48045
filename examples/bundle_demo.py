"""Put a trained demonstration model and its data sets into the package.

    python -m examples.bundle_demo EXPORTED_FOLDER

Copies the Hugging Face folder that ``examples.train_demo --export`` wrote to
``mquant_jax/assets/demo/model``, and draws the calibration set (64 samples, from the training
side) and the held-out evaluation set (500 questions about strings and scenes that training never
shows) beside it. The sets depend on the seeds here alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from examples import demo_tasks
from mquant_jax.samples import BUNDLED_CALIBRATION, BUNDLED_HELDOUT, DEMO_ASSETS, Sample
from mquant_jax.samples import write_samples as write

CALIBRATION, HELD_OUT = 64, 500
LIMIT = 16 * 2**20  # bytes that the bundle may add to the package


def samples(drawn: list[demo_tasks.Sample]) -> list[Sample]:
    return [Sample((s.image,), s.question, s.answer, s.task) for s in drawn]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.bundle_demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("exported", type=Path, help="folder written by train_demo --export")
    args = parser.parse_args()
    if not (args.exported / "model.safetensors").is_file():
        parser.error(f"{args.exported} holds no model.safetensors")
    model = DEMO_ASSETS / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(args.exported, model)
    # Seed 0 is the run's own progress check while it trained; neither seed draws from training.
    write(BUNDLED_CALIBRATION, samples(demo_tasks.calibration_set(CALIBRATION, seed=2)))
    write(BUNDLED_HELDOUT, samples(demo_tasks.eval_set(HELD_OUT, seed=3)))
    size = sum(p.stat().st_size for p in DEMO_ASSETS.rglob("*") if p.is_file())
    print(f"{DEMO_ASSETS}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        parser.error(f"the bundle is larger than {LIMIT / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
