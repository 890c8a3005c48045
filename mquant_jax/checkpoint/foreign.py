"""Recognise model folders that cannot be converted: adapters, quantised weights.

They are recognised by name, so that the message can say what to do instead of listing hundreds of
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.files import is_file, read_json
from mquant_jax.validate import shown

ADAPTER = "adapter_config.json"
_MERGE = "merge it into the base model first (peft: merge_and_unload(), then save_pretrained)"
_FLOAT = "convert the float model that it was made from"
# Parts of the tensor names of unmerged adapters.
_PEFT = re.compile(
    r"^base_model\.model\.|\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|"
    r"modules_to_save|ia3_l|hada_w[12]_[ab]|lokr_w[12]|oft_[rs]|vera_lambda_[bd]|prompt_encoder|"
    r"original_module|Plora_[AB])(\.|$)"
)
# Ends of tensor names, and the quantisation methods that use them.
_QUANTISED = (
    (re.compile(r"\.(qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.qweight$"), "GPTQ or AWQ"),
    (re.compile(r"\.(SCB|absmax|quant_map|nested_absmax|quant_state\..*)$"), "bitsandbytes"),
    (re.compile(r"\.(weight_packed|weight_shape|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"\.(weight_scale|weight_scale_inv|input_scale)$"), "FP8 or compressed-tensors"),
    (re.compile(r"\.(codebooks|codes)$"), "AQLM"),
)
_KEYS = ("quantization_config", "compression_config")
_LANGUAGE = ("text_config", "llm_config")


def refuse_adapter(folder: Path) -> None:
    """
    Raises:
        UserError: the folder holds an adapter, with or without a base model beside it.
    """
    path = folder / ADAPTER
    if not is_file(path):
        return
    base = read_json(path).get("base_model_name_or_path")
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    raise UserError(f"{path}: an adapter{of}, which would be ignored; {_MERGE}, or remove "
                    "the adapter's files to convert the base alone")  # fmt: skip


def refuse_quantised(config: Mapping[str, Any], path: Path) -> None:
    """
    Args:
        config: content of config.json.
        path: its file, for the message.

    Raises:
        UserError: it says that the weights are quantised.
    """
    parts = [("", config)]
    parts += [(f"{k}.", config[k]) for k in _LANGUAGE if isinstance(config.get(k), Mapping)]
    for where, part in parts:
        for key in _KEYS:
            if found := part.get(key):
                raise UserError(f"{path}: {where}{key}: the weights are quantised already, by "
                                f"{_method(found)}; {_FLOAT}")  # fmt: skip


def refuse_foreign_names(names: Iterable[str], folder: Path) -> None:
    """
    Raises:
        UserError: tensors of an unmerged adapter or of quantised weights, by their names.
    """
    for name in names:
        if _PEFT.search(name):
            raise UserError(f"{folder}: tensor {name} is of an adapter that is not merged; "
                            f"{_MERGE}")  # fmt: skip
        for pattern, method in _QUANTISED:
            if pattern.search(name):
                raise UserError(f"{folder}: tensor {name}: the weights are quantised already, as "
                                f"{method} does; {_FLOAT}")  # fmt: skip


def _method(found: Any) -> str:
    """Return the method named in a quantization_config."""
    if not isinstance(found, Mapping):
        return shown(found)
    method = found.get("quant_method")
    if method is None and any(str(k).startswith(("load_in_", "bnb_")) for k in found):
        return "bitsandbytes"
    return method if isinstance(method, str) else "a method that it does not name"
