"""Write a random Hugging Face checkpoint with Qwen2-VL's shapes, whole or cut to a few layers.

    python -m benchmarks.random_checkpoint OUT [--model qwen2_vl-2b] [--layers N|full]
                                           [--shards N] [--vocab 151936]

For measurements without a download. The layer shapes are those of the published model and the
weights are noise. They are written block by block, so a large model needs no more memory than a
small one. Tokenizer and preprocessor files come from the bundled demo model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.aot.sizes import MODELS
from mquant_jax.checkpoint.tensor_file import TensorFileWriter
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.errors import UserError
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.weights import weight_rules
from mquant_jax.samples import DEMO_ASSETS

QWEN2_VL = ("qwen2_vl-2b", "qwen2_vl-7b")
DEMO = "demo"  # the shapes of the bundled model, which has four million parameters
FULL = "full"
_BLOCK = 1 << 24  # values generated at a time
Shapes = dict[str, tuple[int, ...]]


def cut_config(model: str, layers: int | None, vocab: int) -> dict[str, Any]:
    """Return a published Qwen2-VL config, its vocabulary cut to ``vocab`` and both towers to
    ``layers`` (``None``: as published). The demo model's config is returned unchanged."""
    demo = json.loads((DEMO_ASSETS / "model" / "config.json").read_text(encoding="utf-8"))
    if model == DEMO:
        return demo
    ids = {k: v for k, v in demo.items() if k.endswith("token_id")}
    cut = MODELS[model] | ids | {"vocab_size": vocab}
    if layers is None:
        return cut
    tower = cut["vision_config"] | {"depth": layers}
    return cut | {"num_hidden_layers": layers, "vision_config": tower}


def noise(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield blocks of rows of bf16 noise, scaled to keep activations near one."""
    rows = max(1, _BLOCK // int(np.prod(shape[1:])))
    is_norm = "norm" in name or "ln_q" in name
    for start in range(0, shape[0], rows):
        x = rng.standard_normal((min(rows, shape[0] - start), *shape[1:]), dtype=np.float32)
        if len(shape) == 1:
            x = 0.1 * x + (is_norm and not name.endswith("bias"))
        else:
            x *= 0.02 if "embed_tokens" in name else np.prod(shape[1:]) ** -0.5
        yield x.astype(ml_dtypes.bfloat16)


def write(
    out: Path, model: str, layers: int | None, vocab: int, seed: int = 0, shards: int = 1
) -> int:
    """Write the folder; return the size of its tensors in bytes.

    Raises:
        UserError: ``out`` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    return write_folder(out, cut_config(model, layers, vocab), seed, shards)


def write_folder(out: Path, hf: dict[str, Any], seed: int = 0, shards: int = 1) -> int:
    """Like :func:`write`, for any Qwen2-VL config.json."""
    shapes = {r.src: r.src_shape for r in weight_rules(Qwen2VLConfig.from_hf(hf))}
    out.mkdir(parents=True)
    for file in (DEMO_ASSETS / "model").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, out)
    (out / "config.json").write_text(json.dumps(hf, indent=2), encoding="utf-8")
    _write_tensors(out, shapes, np.random.default_rng(seed), shards)
    return 2 * sum(int(np.prod(s)) for s in shapes.values())


def _write_tensors(out: Path, shapes: Shapes, rng: np.random.Generator, shards: int) -> None:
    names = np.array_split(np.array(list(shapes)), shards)
    files = {f"model-{i:05}-of-{shards:05}.safetensors": part for i, part in enumerate(names, 1)}
    if shards == 1:
        files = {"model.safetensors": names[0]}
    else:
        table = {str(name): file for file, part in files.items() for name in part}
        index = json.dumps({"metadata": {}, "weight_map": table})
        (out / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    for file, part in progress(list(files.items()), "random weights"):
        specs = {str(name): (shapes[name], np.dtype(ml_dtypes.bfloat16)) for name in part}
        with TensorFileWriter(out / file, specs) as target:
            for name, (shape, _) in specs.items():
                for block in noise(name, shape, rng):
                    target.write(name, block)


def layer_count(text: str) -> int | None:
    """Parse ``--layers``: a number, or ``full`` (``None``).

    Raises:
        UserError: the text is neither.
    """
    if text == FULL:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--layers {text}: expected a number, 1 or more, or {FULL}")
    return int(text)


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.random_checkpoint", __doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--model", choices=(*QWEN2_VL, DEMO), default=QWEN2_VL[0], help="default %(default)s"
    )
    parser.add_argument("--layers", default="4", metavar=f"N|{FULL}",
                        help="layers of each tower (default 4)")  # fmt: skip
    parser.add_argument("--shards", type=int, default=1, help="number of tensor files (default 1)")
    parser.add_argument("--vocab", type=int, default=151936, help="default 151936")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    layers = layer_count(args.layers)
    size = write(args.out, args.model, layers, args.vocab, args.seed, max(1, args.shards))
    print(f"wrote {args.out} ({size / 1e6:.0f} MB)")
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
