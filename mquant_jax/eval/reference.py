"""Compare a checkpoint, run in float32, with the recorded outputs of a reference implementation.

DIR holds inputs.safetensors and outputs.safetensors. The arrays found there are compared: vision
(vision_pre, vision_conv), deepstack_i, embeds, hidden_i, logits and the greedy tokens, and the same
for a second batch under text_*. Padding is ignored. A rotated checkpoint uses another basis, so
only its logits and greedy tokens can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mquant_jax.checkpoint.manifest import Verify
from mquant_jax.errors import UserError
from mquant_jax.files import is_folder
from mquant_jax.loading import Loaded, load_model
from mquant_jax.models.base import VLM, Batch
from mquant_jax.nn.stack import Runner, num_layers, scan_tapped
from mquant_jax.numerics import AnyArray
from mquant_jax.validate import number

FLOAT_RTOL = 1e-3
_BY_PICTURE = "vision", "deepstack_"  # how the names of arrays begin
_DEEP = "vision/deepstack_"
# Arrays that a reference may record with padding -> the output that is 1 where there is none.
_PADDED = {"vision_pre": "vision_patch_mask"}
# A reference may hold a second batch, text only, under the same names with this prefix.
_TEXT = "text_"
Arrays = dict[str, np.ndarray]


class CaptureRunner(Runner):
    """Records module outputs, and the residual stream before, between and after blocks.

    Attributes:
        seen: name -> output; for a stack ``[layers + 1, ...]``, where entry i is block i's input.
        real: name -> bool, which rows of the output are not padding.
    """

    def __init__(self) -> None:
        self.seen: dict[str, jax.Array] = {}
        self.real: dict[str, AnyArray] = {}

    def tapped(
        self, name: str, stack: nnx.Module, x: jax.Array, context: Any, taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        last, outs = scan_tapped(stack, x, context, range(num_layers(stack)))
        self.seen[name] = jnp.stack([x, *outs])
        self.real[name] = context.token_class >= 0
        return last, tuple(outs[i] for i in taps)

    def module(self, name: str, module: nnx.Module, x: Any, classes: AnyArray | None) -> Any:
        self.seen[name] = out = module(x)
        if classes is not None:
            self.real[name] = classes >= 0
        return out


@nnx.jit
def _forward(model: VLM, batch: Batch) -> tuple[jax.Array, dict, dict]:
    runner = CaptureRunner()
    return model(batch, runner), runner.seen, runner.real


def capture(model: VLM, batch: Batch) -> Arrays:
    """Arrays of one forward pass without a cache, named as in the reference.

    Returns:
        logits, embeds, hidden_i ``[B, T, ...]``; vision and deepstack_i ``[tokens, hidden]`` and
        vision_pre ``[patches, width]`` (with class tokens, unless the tower drops them) of all
        pictures in prompt order, padding removed.
    """
    logits, seen, real = jax.tree.map(np.asarray, _forward(model, batch))
    stream = seen["language/layers"]
    out = {"logits": logits, "embeds": stream[0]}
    out |= {f"hidden_{i}": x for i, x in enumerate(stream)}
    if batch.vision is not None:
        last = seen.get("vision/final", seen["vision/layers"][-1])
        last, kept = (model.vision.selected(x) for x in (last, real["vision/layers"]))
        out["vision_pre"] = last[kept]
        merger = "vision/ends" if "vision/ends" in seen else "vision/merger"
        out["vision"] = seen[merger][real[merger]]
        if "vision/conv" in seen:
            out["vision_conv"] = seen["vision/conv"][real["vision/conv"]]
        for name in seen:  # of a tower with taps
            if name.startswith(_DEEP):
                out[name.removeprefix("vision/")] = seen[name][real[name]]
    return out


def greedy_tokens(model: VLM, batch: Batch, steps: int) -> np.ndarray:
    """Greedy tokens by prefill and cached decoding, int32 ``[B, steps]``; never stops early."""
    rows, width = batch.input_ids.shape
    cache = model.language.init_cache(rows, width + steps)
    logits, cache = nnx.jit(lambda m, b, c: m.prefill(b, c))(model, batch, cache)
    step = nnx.jit(lambda m, *args: m.decode(*args))
    order, position = np.asarray(batch.lengths), np.asarray(batch.next_position)
    out = []
    for i in range(steps):
        tokens = np.argmax(np.asarray(logits), -1).astype(np.int32)
        out.append(tokens)
        if i + 1 < steps:
            logits, cache = step(model, tokens, order + i, position + i, cache)
    return np.stack(out, axis=1)


def compare(loaded: Loaded, inputs: Arrays, outputs: Arrays, origin: Path) -> dict[str, Any]:
    """Errors of every array that both sides have.

    Returns:
        ``{"arrays": {name: {"max_abs", "rel", "shape"}}, "greedy_match": fraction or None,
        "other_basis": names}``; the last lists arrays that a rotation makes incomparable.

    Raises:
        UserError: the reference belongs to another model.
    """
    result = _compare(loaded, inputs, outputs, origin)
    if f"{_TEXT}input_ids" in inputs:
        text = _compare(loaded, _text_part(inputs), _text_part(outputs), origin)
        result["arrays"] |= {f"{_TEXT}{name}": a for name, a in text["arrays"].items()}
        shares = [r["greedy_match"] for r in (result, text) if r["greedy_match"] is not None]
        result["greedy_match"] = min(shares, default=None)
    return result


def _text_part(arrays: Arrays) -> Arrays:
    return {k.removeprefix(_TEXT): v for k, v in arrays.items() if k.startswith(_TEXT)}


def _compare(loaded: Loaded, inputs: Arrays, outputs: Arrays, origin: Path) -> dict[str, Any]:
    batch = _batch(loaded, inputs, origin)
    # A reference whose inputs have one placeholder per picture records its internal mask.
    mask = outputs.get("attention_mask_expanded", inputs["attention_mask"]) == 1
    ours = capture(loaded.model, batch)
    arrays, shared = {}, [n for n in outputs if n in ours]
    rotated = bool(loaded.manifest["recipe"].get("rotate"))
    turned = [n for n in shared if rotated and n != "logits"]
    for name in [n for n in shared if n not in turned]:
        got, ref = ours[name], outputs[name]
        if name.startswith(_BY_PICTURE):  # recorded flat, or picture by picture
            padding = outputs.get(_PADDED.get(name, ""))
            ref = ref.reshape(-1, ref.shape[-1])
            if padding is not None:
                ref = ref[padding.reshape(-1) == 1]
        else:
            if ref.shape[:2] == mask.shape:
                ref = ref[mask]
            got = got[mask]
        if got.shape != ref.shape:
            raise UserError(
                f"{origin}: {name} has shape {list(outputs[name].shape)}, this model gives "
                f"{list(ours[name].shape)}; the reference belongs to another model"
            )
        arrays[name] = {**errors(got, ref), "shape": list(outputs[name].shape)}
    match = None
    if "greedy" in outputs:
        tokens = greedy_tokens(loaded.model, batch, outputs["greedy"].shape[1])
        match = float(np.mean(tokens == outputs["greedy"]))
    if not arrays and match is None:
        raise UserError(f"{origin}: outputs.safetensors has no array that can be compared")
    return {"arrays": arrays, "greedy_match": match, "other_basis": turned}


def errors(got: np.ndarray, ref: np.ndarray) -> dict[str, float]:
    """Largest absolute error, and ``||got - ref|| / ||ref||``, in float64."""
    got, ref = got.astype(np.float64), ref.astype(np.float64)
    diff = got - ref
    rel = np.linalg.norm(diff) / max(np.linalg.norm(ref), np.finfo(np.float64).tiny)
    return {"max_abs": float(np.max(np.abs(diff), initial=0.0)), "rel": float(rel)}


def read_reference(folder: Path) -> tuple[Arrays, Arrays]:
    """The recorded inputs and outputs.

    Raises:
        UserError: a file is missing or damaged.
    """
    if not is_folder(folder):
        raise UserError(f"{folder}: no such folder; --reference takes a folder of recorded arrays")
    found = []
    for name in ("inputs.safetensors", "outputs.safetensors"):
        try:
            found.append(load_file(folder / name))
        except FileNotFoundError as e:
            raise UserError(f"{folder / name}: no such file") from e
        except (SafetensorError, OSError, ValueError, KeyError) as e:
            raise UserError(f"{folder / name}: damaged safetensors file: {e}") from e
    for name in ("input_ids", "attention_mask"):
        if name not in found[0]:
            raise UserError(f"{folder / 'inputs.safetensors'}: lacks {name}")
    return found[0], found[1]


def _batch(loaded: Loaded, inputs: Arrays, origin: Path) -> Batch:
    ids, vocab = inputs["input_ids"], loaded.config.language.vocab_size
    if ids.min() < 0 or ids.max() >= vocab:
        raise UserError(f"{origin}: a token id is outside the model's vocabulary of {vocab}")
    try:
        return loaded.family.reference_batch(loaded.config, inputs)
    except (KeyError, ValueError, IndexError, StopIteration, RuntimeError) as e:
        raise UserError(f"{origin}: inputs do not fit this model: {e}") from e


def judge(result: dict[str, Any], rtol: float | None, is_float: bool) -> bool:
    """Whether the checkpoint passes.

    A float checkpoint must be within ``rtol`` (default 1e-3) and match every greedy token. A
    quantised one must be within ``rtol`` if it is given.
    """
    if rtol is None and not is_float:
        return True
    limit = FLOAT_RTOL if rtol is None else rtol
    within = all(a["rel"] <= limit for a in result["arrays"].values())  # false for NaN
    return within and (not is_float or result["greedy_match"] in (None, 1.0))


def verify_reference(
    checkpoint: Path, reference: Path, rtol: float | None = None, verify: Verify = True
) -> dict[str, Any]:
    """The result of :func:`compare`, with ``ok`` added.

    Raises:
        UserError: a bad tolerance, checkpoint or reference.
    """
    rtol = None if rtol is None else number(rtol, "--rtol", least=0)
    inputs, outputs = read_reference(reference)
    loaded = load_model(checkpoint, jnp.float32, verify=verify)
    with jax.default_matmul_precision("highest"):  # no TF32 on GPUs
        result = compare(loaded, inputs, outputs, reference)
    is_float = not any("bits" in entry for entry in loaded.manifest["tensors"].values())
    return {"ok": judge(result, rtol, is_float), **result}
