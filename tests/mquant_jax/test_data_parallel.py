"""Batches split over devices: eight virtual ones on one CPU."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from mquant_jax.runtime.data_parallel import cut
from tests.helpers import golden_model

DEVICES = 8
CASES = {"qwen2_vl/public": {}}
MORE = {  # clips; visual experts; towers of fixed size; text only; taps
    "qwen2_vl/public_video": {"kv_cache": "int8"},
    "cogvlm2/public": {"layout": "aifs"},
    "internvl/public": {},
    "llama/public": {},
    "qwen3_vl/public": {},
}
SCRIPT = """
import json, sys
import jax, numpy as np
from mquant_jax.models.registry import family_for
from mquant_jax.runtime.data_parallel import DataParallel
from mquant_jax.runtime.generate import Generator
from tests.helpers import golden_model

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
for case, options in json.loads(sys.argv[1]).items():
    family, model, config, inputs, _ = golden_model(case)
    batch = family.reference_batch(config, inputs)
    one = Generator(model, (), **options)
    all_ = DataParallel(model, (), devices=jax.devices(), **options)
    tokens = one.generate(batch, 5).tokens
    near = zip(one.force(batch, tokens), all_.force(batch, tokens), strict=True)
    programs = [all_.programs.get(all_.owner, k, None) for k in all_.programs.keys(all_.owner)]
    print(json.dumps({
        "case": case, "devices": all_.mesh.size, "rows": len(tokens),
        "equal": all_.generate(batch, 5).tokens == tokens,
        "forced": float(max(np.abs(a - b).max() for a, b in near)),
        "collectives": [c for p in programs for c in COLLECTIVES if c in p.as_text()],
    }))
"""


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)])
def test_eight_devices_answer_as_one(cases) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags}
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["case"] for row in found] == list(cases)
    for row in found:
        assert row["devices"] == DEVICES and row["rows"] > 0, row
        assert row["equal"] and row["forced"] < 1e-3 and row["collectives"] == [], row


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_part_has_its_own_pictures(parts) -> None:
    family, model, config, inputs, _ = golden_model("qwen2_vl/public")
    batch = jax.tree.map(np.asarray, family.reference_batch(config, inputs))
    per_row = model.vision.tokens(batch.vision.patches.shape[1])
    wanted = [batch.vision.patches[i // per_row, 0] for i in batch.visual_index[batch.order >= 0]]
    shares = cut(model, batch, parts, "cpu")
    rows = shares.batch.order.shape[0]
    assert rows % parts == 0 and rows // parts & (rows // parts - 1) == 0
    found, tokens = [], model.vision.tokens(shares.vision[0].patches.shape[1])
    for row, (index, order) in enumerate(
        zip(shares.batch.visual_index, shares.batch.order, strict=True)
    ):
        part = row // (rows // parts)
        own = [v.patches.reshape(parts, -1, *v.patches.shape[1:])[part] for v in shares.vision]
        own = np.concatenate(own)
        found += [own[i // tokens, 0] for i in index[order >= 0] if i >= 0]
    wanted = [
        x for x, i in zip(wanted, batch.visual_index[batch.order >= 0], strict=True) if i >= 0
    ]
    np.testing.assert_array_equal(np.stack(found), np.stack(wanted))
