"""Compile data-parallel generation for several chips that are not here, and look for collectives.

    python -m benchmarks.aot.data_parallel [--target tpu-v5e] [--model qwen2_vl-2b] [--layers N]

The programs of DataParallel (vision tower, prompts, decode loop) of a W4A8 model are compiled for
all chips of the target's smallest slice (2x2 of a v5e): pictures and prompts cut among the chips,
weights on each. No chip may have to wait for another inside a program: exits with 1 where a program
holds a collective. No weights are made.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.aot.backend import chips, prepare
from benchmarks.aot.devices import DEVICES
from benchmarks.aot.hlo import parse
from benchmarks.aot.programs import loaded
from benchmarks.aot.sizes import MODELS
from mquant_jax.cli_support import FAILED, OK, Parser, run_cli
from mquant_jax.models.base import abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.presets import PRESETS
from mquant_jax.runtime.data_parallel import DataParallel
from mquant_jax.target import tracing_for

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter",
               "collective-broadcast", "send", "recv")  # fmt: skip
PATCHES, TOKENS, SLOTS, ROWS = 1024, 512, 1024, 4  # of a picture, a prompt, its cache; per chip


class Shapes(DataParallel):
    """Weights that are shapes, for compiling alone."""

    def put(self, params: Any) -> Any:
        where = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params
        )


def collectives(text: str) -> list[str]:
    """Instructions of compiled HLO that wait for other chips."""
    found = [
        i.opcode for c in parse(text).computations.values() for i in c.instructions.values()
    ]  # fmt: skip
    return [op for op in found if any(op == c or op.startswith(f"{c}-") for c in COLLECTIVES)]


def measure(target: str, model: str, layers: int) -> dict[str, Any]:
    """Collectives of each program."""
    device = DEVICES[target]
    prepare(device)
    found = chips(device)
    family = family_for(MODELS[model], model)
    config = family.config_from_hf(MODELS[model])
    language = dataclasses.replace(config.language, num_layers=layers, tied_head=False)
    config = dataclasses.replace(config, language=language)
    with tracing_for(device.platform, device.name):
        module = jax.eval_shape(
            loaded, abstract_model(family, config, PRESETS["w4a8"], jnp.bfloat16)
        )
        runner = Shapes(module, (0,), devices=found)
        rows = ROWS * len(found)
        features = (rows, module.vision.tokens(PATCHES), language.hidden_size)
        texts = {
            "see": runner._compile_see(rows, PATCHES),
            "begin": runner._compile_begin(rows, TOKENS, SLOTS, (features,), None),
            "decode": runner._compile_decode(rows, SLOTS),
        }
    return {
        "target": target,
        "chips": len(found),
        "model": model,
        "layers": layers,
        "collectives": {name: collectives(c.as_text()) for name, c in texts.items()},
    }


def _run(argv: list[str]) -> int:
    parser = Parser("python -m benchmarks.aot.data_parallel", __doc__ or "")
    parser.add_argument("--target", default="tpu-v5e", choices=tuple(DEVICES))
    parser.add_argument("--model", default="qwen2_vl-2b", choices=tuple(MODELS))
    parser.add_argument("--layers", type=int, default=2, help="of the decoder (default 2)")
    args = parser.parse_args(argv)
    result = measure(args.target, args.model, args.layers)
    print(json.dumps(result))
    return FAILED if any(result["collectives"].values()) else OK


if __name__ == "__main__":
    sys.exit(run_cli(_run))
