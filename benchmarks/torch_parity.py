"""Compare transformers' torch model with our float conversion of the same Hugging Face folder.

    pip install -e ".[parity]" && python -m benchmarks.torch_parity [FOLDER] [--questions 50]

Loads FOLDER (default: the bundled demo model) as transformers'
``Qwen2VLForConditionalGeneration`` in float32 and answers held-out questions greedily. Compares its
answers with our converted model's token by token, and the logits of each prompt's last token. The
exit status is 1 if any answer differs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.api import Model, load
from mquant_jax.cli_support import FAILED, OK, Parser, progress, run_cli
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.convert import convert
from mquant_jax.runtime.generate import prefill
from mquant_jax.samples import BUNDLED_HELDOUT, DEMO_ASSETS, Sample, read_samples

NEW_TOKENS = 10


def torch_answers(folder: Path, model: Model, samples: list[Sample]):
    """Yield greedy tokens and last-position logits of the torch model, one sample at a time."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    reference = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for sample in progress(samples, "torch"):
        prompt = sample.prompt(model.processor)
        ids = torch.tensor([prompt.input_ids])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
            "pixel_values": torch.tensor(prompt.patches),
            "image_grid_thw": torch.tensor(prompt.grids),
        }
        with torch.no_grad():
            logits = reference(**inputs).logits[0, -1].numpy()
            out = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        tokens = out[0, ids.shape[1] :].tolist()
        stops = [i for i, t in enumerate(tokens) if t in model.processor.stop_ids]
        yield tokens[: stops[0]] if stops else tokens, logits


def compare(folder: Path, samples: list[Sample]) -> dict:
    """Return the number of equal answers and the largest relative difference of logits."""
    with tempfile.TemporaryDirectory() as scratch:
        convert(folder, Path(scratch) / "float", PRESETS["float"])
        model = load(Path(scratch) / "float", jnp.float32)
        return _compare(folder, model, samples)


def _compare(folder: Path, model: Model, samples: list[Sample]) -> dict:
    run = jax.jit(prefill, static_argnums=2)
    equal, worst = 0, 0.0
    for sample, (tokens, logits) in zip(
        samples, torch_answers(folder, model, samples), strict=True
    ):
        prompt = sample.prompt(model.processor)
        ours = model.generate_prompts([prompt], NEW_TOKENS).tokens[0]
        mine = np.asarray(run(model.module, model.collate([prompt]), 64)[0][0])
        worst = max(worst, float(np.linalg.norm(mine - logits) / np.linalg.norm(logits)))
        equal += ours == tokens
    return {"questions": len(samples), "equal_answers": equal, "worst_logits_rel": worst}


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.torch_parity", __doc__ or "")
    parser.add_argument("folder", nargs="?", type=Path, default=DEMO_ASSETS / "model")
    parser.add_argument("--questions", type=int, default=50, metavar="N", help="default 50")
    args = parser.parse_args(argv)
    result = compare(args.folder, read_samples(BUNDLED_HELDOUT, args.questions))
    print(json.dumps(result))
    return OK if result["equal_answers"] == result["questions"] else FAILED


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
