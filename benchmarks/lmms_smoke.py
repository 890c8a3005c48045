"""Run lmms-eval itself on a checkpoint, with a task made of local files, and compare.

    python -m benchmarks.lmms_smoke CKPT [--limit 20] [--json]

The task asks the demonstration model's held-out set. lmms-eval runs in a process of its own without
a network, finds our model through the entry point, and scores by exact match; the share must be
that of ``mquant_jax eval`` on the same questions. Needs the extra lmms-eval; .ci/lmms_eval makes an
environment for it. Exits with 1 where the shares differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from mquant_jax.cli_support import FAILED, OK, Parser, run_cli
from mquant_jax.errors import UserError
from mquant_jax.eval.evaluation import evaluate
from mquant_jax.eval.tasks import find_task
from mquant_jax.runtime.options import Options
from mquant_jax.samples import BUNDLED_HELDOUT, read_samples

TASK = "mquant_jax_smoke"
TOKENS = 16
_YAML = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {{data}}
test_split: test
output_type: generate_until
doc_to_visual: !function smoke.pictures
doc_to_text: !function smoke.text
doc_to_messages: !function smoke.messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {TOKENS}
  temperature: 0
  do_sample: false
  until: ["\\n\\n"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_FUNCTIONS = """\
from PIL import Image


def pictures(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]


def text(doc):
    return doc["question"]


def messages(doc, **_):
    parts = [{"type": "image", "url": picture} for picture in pictures(doc)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text(doc)}]}]
"""


def write_task(folder: Path, limit: int) -> None:
    """The held-out set's first questions as a task, its pictures as PNG files."""
    rows = []
    for i, sample in enumerate(read_samples(BUNDLED_HELDOUT, limit)):
        paths = []
        for j, picture in enumerate(sample.images):
            paths.append(str(folder / f"{i}-{j}.png"))
            Image.fromarray(picture).save(paths[-1])
        rows.append({"question": sample.question, "answer": sample.answer, "images": paths})
    data = folder / "data.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    (folder / f"{TASK}.yaml").write_text(_YAML.format(data=data), encoding="utf-8")
    (folder / "smoke.py").write_text(_FUNCTIONS, encoding="utf-8")


def run_lmms_eval(checkpoint: Path, folder: Path, batch_size: int) -> float:
    """The share of exact matches that lmms-eval reports.

    Raises:
        UserError: it failed.
    """
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "mquant_jax",
        "--model_args", f"pretrained={checkpoint}", "--batch_size", str(batch_size),
        "--tasks", TASK, "--include_path", str(folder), "--output_path", str(folder / "out"),
        "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    results = sorted((folder / "out").rglob("*results.json"))
    if done.returncode or not results:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"lmms_eval ended with {done.returncode}: {''.join(last)}")
    found = json.loads(results[-1].read_text(encoding="utf-8"))["results"][TASK]
    return next(v for k, v in found.items() if k.startswith("exact_match,"))


def measure(checkpoint: Path, limit: int, batch_size: int) -> dict[str, Any]:
    """Both shares, 0..1."""
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), limit)
        theirs = run_lmms_eval(checkpoint, Path(folder), batch_size)
    options = Options(TOKENS, batch_size=batch_size, limit=limit)
    ours = evaluate([checkpoint], find_task("demo"), options=options).models[0].score / 100
    return {"questions": limit, "lmms_eval": theirs, "mquant_jax": ours, "equal": theirs == ours}


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.lmms_smoke", __doc__ or "")
    parser.add_argument("checkpoint", type=Path, help="of the demonstration model")
    parser.add_argument("--limit", type=int, default=20, help="questions (default 20)")
    parser.add_argument("--batch-size", type=int, default=8, help="default 8")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    result = measure(args.checkpoint, args.limit, args.batch_size)
    print(json.dumps(result) if args.json else
          f"{result['questions']} questions: lmms-eval {result['lmms_eval']:.3f}, "
          f"mquant_jax eval {result['mquant_jax']:.3f}")  # fmt: skip
    return OK if result["equal"] else FAILED


if __name__ == "__main__":
    sys.exit(run_cli(_run))
