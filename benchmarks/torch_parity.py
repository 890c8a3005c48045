"""Compare transformers' torch model with our float conversion of the same Hugging Face folder.

    pip install -e ".[parity]" && python -m benchmarks.torch_parity [FOLDER] [--questions 50]
    python -m benchmarks.torch_parity LLAVA --samples benchmarks/assets/llava/evaluation.jsonl

Loads FOLDER (a Qwen2-VL or LLaVA; default: the bundled demo model) as transformers' own class in
float32 and answers held-out questions greedily. Compares its answers with our converted model's
token by token, and the logits of each prompt's last token. The exit status is 1 if any answer
differs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mquant_jax.api import Model, load
from mquant_jax.cli_support import FAILED, OK, Parser, progress, run_cli
from mquant_jax.errors import UserError
from mquant_jax.presets import PRESETS
from mquant_jax.ptq.convert import convert
from mquant_jax.runtime.generate import prefill
from mquant_jax.samples import BUNDLED_HELDOUT, DEMO_ASSETS, Sample, read_samples

NEW_TOKENS = 10


def torch_answers(folder: Path, model: Model, samples: list[Sample]):
    """Yield greedy tokens and last-position logits of the torch model, one sample at a time."""
    import torch
    from transformers import AutoModelForImageTextToText

    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for sample in progress(samples, "torch"):
        prompt = sample.prompt(model.processor)
        ids = torch.tensor([prompt.input_ids])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            **PICTURES[_name(model)](model, prompt, ids),
        }
        with torch.no_grad():
            logits = reference(**inputs).logits[0, -1].numpy()
            out = reference.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        tokens = out[0, ids.shape[1] :].tolist()
        stops = [i for i, t in enumerate(tokens) if t in model.processor.stop_ids]
        yield tokens[: stops[0]] if stops else tokens, logits


def _qwen2_vl(model: Model, prompt: Any, ids: Any) -> dict[str, Any]:
    import torch

    return {
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "pixel_values": torch.tensor(prompt.patches),
        "image_grid_thw": torch.tensor(prompt.grids),
    }


def _llava(model: Model, prompt: Any, ids: Any) -> dict[str, Any]:
    """Squares out of their patches, float32 ``[pictures, 3, side, side]``."""
    import torch

    size, n = model.config.patch_size, model.config.image_size // model.config.patch_size
    x = prompt.patches.reshape(len(prompt.grids), n, n, 3, size, size).transpose(0, 3, 1, 4, 2, 5)
    return {"pixel_values": torch.tensor(x.reshape(-1, 3, n * size, n * size))}


# A family's pictures as its torch model takes them.
PICTURES: dict[str, Callable[[Model, Any, Any], dict[str, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "llava": _llava,
}


def _name(model: Model) -> str:
    return model.family.name if model.family else ""


def compare(folder: Path, samples: list[Sample]) -> dict:
    """Return the number of equal answers and the largest relative difference of logits."""
    with tempfile.TemporaryDirectory() as scratch:
        convert(folder, Path(scratch) / "float", PRESETS["float"])
        model = load(Path(scratch) / "float", jnp.float32)
        if _name(model) not in PICTURES:
            raise UserError(
                f"{folder}: family {_name(model)}; expected one of {', '.join(PICTURES)}"
            )
        return _compare(folder, model, samples)


def _compare(folder: Path, model: Model, samples: list[Sample]) -> dict:
    run = jax.jit(prefill, static_argnums=2)
    equal, worst = 0, 0.0
    for sample, (tokens, logits) in zip(
        samples, torch_answers(folder, model, samples), strict=True
    ):
        prompt = sample.prompt(model.processor)
        ours = model.generate_prompts([prompt], NEW_TOKENS).tokens[0]
        batch = model.collate([prompt])
        mine = np.asarray(run(model.module, batch, batch.input_ids.shape[1])[0][0])
        worst = max(worst, float(np.linalg.norm(mine - logits) / np.linalg.norm(logits)))
        equal += ours == tokens
    return {"questions": len(samples), "equal_answers": equal, "worst_logits_rel": worst}


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.torch_parity", __doc__ or "")
    parser.add_argument("folder", nargs="?", type=Path, default=DEMO_ASSETS / "model")
    parser.add_argument("--questions", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument("--samples", type=Path, default=BUNDLED_HELDOUT, metavar="FILE.jsonl",
                        help="the questions (default: the demo's, held out)")  # fmt: skip
    args = parser.parse_args(argv)
    result = compare(args.folder, read_samples(args.samples, args.questions))
    print(json.dumps(result))
    return OK if result["equal_answers"] == result["questions"] else FAILED


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
