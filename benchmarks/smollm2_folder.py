"""Write SmolLM2-135M-Instruct as a Hugging Face folder, with calibration and evaluation text.

    python -m benchmarks.smollm2_folder OUT

``OUT/model``              config, tokenizer and bfloat16 weights (see benchmarks/smollm2.py for
                           their origin and for what to install); no chat template, so that prompts
                           are plain text
``OUT/calibration.jsonl``  16 windows of 512 tokens
``OUT/evaluation.txt``     text for ``python -m mquant_jax eval --task perplexity``

The folder stands for a small published language model, for example to measure a conversion::

    python -m benchmarks.conversion --source OUT/model --calibration OUT/calibration.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer

from benchmarks.packaged import packaged_file
from benchmarks.smollm2 import (
    CALIBRATION,
    CALIBRATION_WINDOWS,
    EVALUATION,
    hf_config,
    load,
    windows_of,
)
from mquant_jax.checkpoint.tensor_file import TensorFileWriter
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.errors import UserError

_END = "<|im_end|>"


def write(out: Path) -> int:
    """Write the folder.

    Returns:
        The size of its tensors in bytes.

    Raises:
        UserError: ``out`` exists, or a package is missing.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    family, config, params, tokenizer = load()
    model = out / "model"
    model.mkdir(parents=True)
    _write_json(model / "config.json", hf_config() | {"dtype": "bfloat16"})
    tokenizer.save(str(model / "tokenizer.json"))
    _write_json(model / "tokenizer_config.json", {"eos_token": _END, "pad_token": _END})
    _write_json(model / "generation_config.json", {"eos_token_id": tokenizer.token_to_id(_END)})
    names = {rule.src: rule.dst for rule in family.weight_rules(config)}
    bf16 = np.dtype(ml_dtypes.bfloat16)
    specs = {src: (params[dst].shape, bf16) for src, dst in names.items()}
    with TensorFileWriter(model / "model.safetensors", specs) as target:
        for src, dst in progress(list(names.items()), "write weights"):
            target.write(src, params[dst].astype(bf16))
    _write_text(out, tokenizer)
    return 2 * sum(int(np.prod(shape)) for shape, _ in specs.values())


def _write_text(out: Path, tokenizer: Tokenizer) -> None:
    windows = windows_of(CALIBRATION, tokenizer, CALIBRATION_WINDOWS)
    with (out / "calibration.jsonl").open("w", encoding="utf-8") as file:
        for window in windows:
            text = tokenizer.decode(window.tolist(), skip_special_tokens=False)
            file.write(json.dumps({"question": text, "answer": ""}) + "\n")
    text = "\n".join(packaged_file(*f).read_text(encoding="latin-1").strip() for f in EVALUATION)
    (out / "evaluation.txt").write_text(text, encoding="utf-8")


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.smollm2_folder", __doc__ or "")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    print(f"wrote {args.out} ({write(args.out) / 1e6:.0f} MB)")
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
