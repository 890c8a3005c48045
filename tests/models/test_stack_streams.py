"""The declaration of streams follows from the parts of which a model is built."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from mquant_jax.models.base import abstract_model, with_head
from mquant_jax.models.stack_streams import Layers
from mquant_jax.nn.attention import Attention
from mquant_jax.nn.mlp import GatedMLP
from mquant_jax.nn.params import dense_layers
from mquant_jax.nn.vit_block import GatedViTBlock, PostNormViTBlock, ViTBlock
from mquant_jax.ptq.rotate import expand
from tests.family_cases import ROTATED, changed_config, family_of

CASES = [
    "cogvlm2/public", "glm4v/public", "internvl/public", "internvl2/public", "llama/public",
    "llava/public", "llava/public_dinov2", "minicpmv2_6/public", "qwen2/public",
    "qwen2_5_vl/public", "qwen2_vl/public", "qwen3_vl/public", "qwen_vl/public",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_layer_but_the_patch_embedding_has_rotated_inputs(case) -> None:
    """Each once: by the stream that it reads, by the values' rotation, or online."""
    family, config = family_of(changed_config(case))
    config = with_head(config, tied=False)
    made = set(dense_layers(abstract_model(family, config, ROTATED)))
    names = {f"{path}/kernel": None for path in made}
    declared = family.streams(config)
    reads = (read for stream in declared.streams for read in stream.reads)
    found = [
        *(reader for read in reads for reader in read.readers),
        *(output for attention in declared.attentions for _, output in attention.pairs),
        *(hidden.reader for hidden in declared.hiddens),
    ]
    paths = [path for pattern in found for path in expand(pattern, names)]
    assert len(paths) == len(set(paths))
    assert set(paths) == made - {"vision/patch_embed/proj", "language/embedding"}


def test_a_part_of_another_kind_is_declared_by_its_points() -> None:
    class Wide(GatedMLP):
        POINTS: ClassVar = {"mlp_in": ("a", "b", "c"), "mlp_hidden": ("last",)}
        SIGNS = "b"

    class Block(GatedViTBlock, Wide):
        POINTS: ClassVar = {**Attention.POINTS, **Wide.POINTS}
        SIGNS = Wide.SIGNS

    layers = Layers("vision/layers/*", Block)
    assert layers.writers == ("vision/layers/*/o_proj", "vision/layers/*/last")
    assert layers.reads()[1].readers == tuple(f"vision/layers/*/{name}" for name in "abc")
    (hidden,) = layers.hiddens(64)
    assert hidden.sign_carrier == "vision/layers/*/b" and hidden.width == 64


def test_only_a_tower_with_norms_that_fuse_has_a_stream() -> None:
    family, config = family_of(changed_config("qwen2_vl/public"))
    streams = {
        block: family.streams(
            dataclasses.replace(config, vision=dataclasses.replace(config.vision, block=block))
        )
        for block in (ViTBlock, GatedViTBlock, PostNormViTBlock)
    }
    assert [s.name for s in streams[ViTBlock].streams] == ["vision", "language"]
    assert streams[GatedViTBlock].streams[0].writers[-1].endswith("/down_proj")
    assert [s.name for s in streams[PostNormViTBlock].streams] == ["language"]
    online = [h.reader for h in streams[PostNormViTBlock].hiddens if h.reads_stream]
    assert [path.rpartition("/")[2] for path in online] == ["q_proj", "k_proj", "v_proj", "fc1"]
