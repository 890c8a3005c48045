"""Write a random Hugging Face folder of Qwen2-VL's shape, cut to a few layers.

    python -m benchmarks.random_checkpoint OUT [--model qwen2_vl-2b] [--layers 4] [--vocab 151936]

For speed measurements without a download: the layer shapes are those of the published model,
the weights are noise. Tokenizer and preprocessor files are those of the bundled demo model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.weights import weight_rules
from safetensors.numpy import save_file

from benchmarks.aot.sizes import MODELS
from mquant_jax.cli_support import OK, Parser, progress, run_cli
from mquant_jax.errors import UserError
from mquant_jax.samples import DEMO_ASSETS

QWEN2_VL = ("qwen2_vl-2b", "qwen2_vl-7b")
DEMO = "demo"  # the shapes of the bundled model, which has four million parameters


def cut_config(model: str, layers: int, vocab: int) -> dict:
    """A published Qwen2-VL config, both towers cut to ``layers``, the vocabulary to ``vocab``; the
    demo model's as it is."""
    demo = json.loads((DEMO_ASSETS / "model" / "config.json").read_text(encoding="utf-8"))
    if model == DEMO:
        return demo
    ids = {k: v for k, v in demo.items() if k.endswith("token_id")}
    full = MODELS[model]
    tower = full["vision_config"] | {"depth": layers}
    cut = {"num_hidden_layers": layers, "vocab_size": vocab, "vision_config": tower}
    return full | ids | cut


def random_tensors(config: Qwen2VLConfig, seed: int) -> dict[str, np.ndarray]:
    """bf16 noise of every published shape, scaled so that activations stay near one."""
    rng = np.random.default_rng(seed)
    shapes = {r.src: r.src_shape for r in weight_rules(config)}
    out = {}
    for name, shape in progress(list(shapes.items()), "random weights"):
        x = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            x = 0.1 * x + ("norm" in name or "ln_q" in name) * (not name.endswith("bias"))
        else:
            x *= 0.02 if "embed_tokens" in name else np.prod(shape[1:]) ** -0.5
        out[name] = x.astype(ml_dtypes.bfloat16)
    return out


def write(out: Path, model: str, layers: int, vocab: int, seed: int = 0) -> int:
    """Write the folder; the size of its tensors in bytes.

    Raises:
        UserError: ``out`` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    hf = cut_config(model, layers, vocab)
    tensors = random_tensors(Qwen2VLConfig.from_hf(hf), seed)
    out.mkdir(parents=True)
    for file in (DEMO_ASSETS / "model").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, out)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(hf, indent=2), encoding="utf-8")
    return sum(t.nbytes for t in tensors.values())


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.random_checkpoint", __doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--model", choices=(*QWEN2_VL, DEMO), default=QWEN2_VL[0], help="default %(default)s"
    )
    parser.add_argument("--layers", type=int, default=4, help="layers of each tower (default 4)")
    parser.add_argument("--vocab", type=int, default=151936, help="default 151936")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    size = write(args.out, args.model, args.layers, args.vocab, args.seed)
    print(f"wrote {args.out} ({size / 1e6:.0f} MB)")
    return OK


if __name__ == "__main__":
    raise SystemExit(run_cli(_run))
