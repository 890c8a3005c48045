"""Shape, inputs and export of the demo model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from examples import demo_pictures, demo_tasks, demo_tokenizer
from mquant_jax.models.base import Batch, VisionInput
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.modeling import Qwen2VL
from mquant_jax.models.qwen2_vl.weights import export_hf
from mquant_jax.nn.params import get_params

PATCH, MERGE, GRID = 14, 2, demo_pictures.SIZE // 14
SIDE = GRID // MERGE  # visual tokens along each side
VISUAL = SIDE * SIDE
LENGTH = 32  # tokens of the longest prompt with its answer
EARLY = 8  # tokens before the answer that also predict its first token
YES_NO = ("no", "yes")
PLACE_CLASSES = (4, 4, 4, 4, 3, 4, 4)  # classes of each label from ``Collator.places``
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# Normalised value of each uint8 in each channel, [3, 256].
NORMALIZED = ((np.arange(256) * (1 / 255)).astype(np.float32) - MEAN[:, None]) / STD[:, None]
Pair = tuple[Batch, dict[str, np.ndarray]]  # inputs, targets


def hf_config() -> dict[str, Any]:
    """Return the demo model's ``config.json``, with flat keys as on the Hub."""
    hidden = 256
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **demo_tokenizer.special_ids(demo_tokenizer.build()),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vision_config": {
            "depth": 4,
            "embed_dim": 192,
            "mlp_ratio": 3,
            "num_heads": 6,
            "in_chans": 3,
            "hidden_size": hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": 2,
        },
        "vocab_size": demo_tokenizer.VOCAB_SIZE,
    }


def patchify(images: np.ndarray) -> np.ndarray:
    """Cut uint8 images ``[N, 84, 84, 3]`` into Qwen2-VL patches, float32 ``[N, 36, 1176]``."""
    n = len(images)
    x = images.reshape(n, SIDE, MERGE, PATCH, SIDE, MERGE, PATCH, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(n, GRID * GRID, 3, PATCH * PATCH)
    out = np.empty((n, GRID * GRID, 3, 2, PATCH * PATCH), np.float32)
    for channel in range(3):
        out[:, :, channel] = NORMALIZED[channel][x[:, :, channel]][:, :, None]  # two equal frames
    return out.reshape(n, GRID * GRID, -1)


def patch_coords() -> np.ndarray:
    """Return each patch's row and column in merge-block order: int32 ``[36, 2]``."""
    grid = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID), indexing="ij"), -1)
    blocks = grid.reshape(SIDE, MERGE, SIDE, MERGE, 2).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(-1, 2).astype(np.int32)


class Collator:
    """Turns samples into a left-padded ``Batch`` with its training targets.

    ``answer``, int32 ``[N, T]``, is the next token, or -1 where there is no loss. ``early``, int32
    ``[N, T]``, is the answer's first token, at the last tokens of the question. ``cells``, int32
    ``[N, 9, 6]``, says where each visual token is and what it shows. ``places``, int32
    ``[N, T, 7]``, is described at :meth:`places`.
    """

    def __init__(self) -> None:
        self.tokenizer = demo_tokenizer.build()
        self.pad = self.tokenizer.token_to_id("<|endoftext|>")
        image = self.tokenizer.token_to_id("<|image_pad|>")
        self.head = self.encode("<|im_start|>user\n<|vision_start|>")
        self.start = len(self.head)
        self.head += [image] * VISUAL + self.encode("<|vision_end|>")
        self.tail = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self.encode("<|im_end|>")
        # Token -> (column in ``cells``, label) of words that may name an item.
        self.names = {
            self.encode(space + word)[0]: (column, label)
            for column, words in ((2, demo_pictures.SHAPES), (3, demo_pictures.COLORS))
            for label, word in enumerate(words, 1)
            for space in ("", " ")
        }
        grid = np.arange(VISUAL)
        self.image_positions = self.start + np.stack([grid * 0, grid // SIDE, grid % SIDE])

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``; special tokens are recognised."""
        return self.tokenizer.encode(text).ids

    def places(self, ids: list[int], sample: demo_tasks.Sample) -> np.ndarray:
        """Return location labels of the tokens that name an item, int32 ``[T, 7]``; -1: none.

        Columns 0 and 1 are the item's column and row, from 1. Columns 2 and 3 say whether it lies
        before, level with or after the item named first (1, 2, 3), along columns and along rows.
        Column 4 is a yes-or-no answer (no 1, yes 2). Columns 5 and 6 are the column and row of the
        item that answers the question, if the answer names one.
        """
        out = np.full((len(ids), len(PLACE_CLASSES)), -1, np.int32)
        wanted = np.full(2, -1)
        if sample.task == "relation" and sample.answer not in YES_NO:
            wanted = self._place(self.encode(sample.answer)[-1], sample.cells)
        first = None
        for i, token in enumerate(ids):
            place = self._place(token, sample.cells)
            if place is None:
                continue
            out[i, :2], out[i, 5:] = place, wanted
            first = place if first is None else first
            if (first != place).any():
                out[i, 2:4] = np.sign(place - first) + 2
                if sample.answer in YES_NO:
                    out[i, 4] = YES_NO.index(sample.answer) + 1
        return out

    def _place(self, token: int, cells: np.ndarray) -> np.ndarray | None:
        """Return the column and row, from 1, of the item that a word names; ``None`` unless
        unique."""
        column, label = self.names.get(token, (2, -1))
        found = np.flatnonzero(cells[:, column] == label)
        return cells[found[0], :2] if len(found) == 1 else None

    def __call__(self, samples: list[demo_tasks.Sample]) -> Pair:
        n = len(samples)
        ids = np.full((n, LENGTH), self.pad, np.int32)
        order = np.full((n, LENGTH), -1, np.int32)
        positions = np.zeros((3, n, LENGTH), np.int32)
        token_class = np.full((n, LENGTH), -1, np.int32)
        visual_index = np.full((n, LENGTH), -1, np.int32)
        targets = np.full((n, LENGTH), -1, np.int32)
        early = np.full((n, LENGTH), -1, np.int32)
        places = np.full((n, LENGTH, len(PLACE_CLASSES)), -1, np.int32)
        first = self.start + VISUAL  # first token after the picture
        for i, s in enumerate(samples):
            answer = self.encode(s.answer) + self.end
            row = self.head + self.encode(s.question) + self.tail + answer
            pad = LENGTH - len(row)
            if pad < 0:
                raise ValueError(f"{len(row)} tokens do not fit {LENGTH}: {s.question!r}")
            ids[i, pad:] = row
            order[i, pad:] = np.arange(len(row))
            positions[:, i, pad:] = np.arange(len(row)) - (VISUAL - SIDE)
            positions[:, i, pad : pad + self.start] = np.arange(self.start)
            picture = slice(pad + self.start, pad + first)
            positions[:, i, picture] = self.image_positions
            token_class[i, pad:] = 0
            token_class[i, picture] = 1
            visual_index[i, picture] = i * VISUAL + np.arange(VISUAL)
            targets[i, LENGTH - 1 - len(answer) : LENGTH - 1] = answer
            last = LENGTH - 1 - len(answer)
            early[i, last - EARLY : last] = answer[0]
            asked = slice(pad + first, LENGTH - len(answer))
            places[i, asked] = self.places(ids[i, asked].tolist(), s)
        vision = VisionInput(
            patches=patchify(np.stack([s.image for s in samples])),
            coords=np.broadcast_to(patch_coords(), (n, GRID * GRID, 2)),
            valid=np.ones((n, GRID * GRID), bool),
        )
        batch = Batch(
            input_ids=ids,
            order=order,
            positions=positions,
            token_class=token_class,
            visual_index=visual_index,
            vision=vision,
        )
        cells = np.stack([s.cells for s in samples])
        return batch, {"answer": targets, "early": early, "cells": cells, "places": places}


def export(model: Qwen2VL, folder: Path) -> None:
    """Write the Hugging Face folder: configs, bfloat16 weights and the tokenizer."""
    demo_tokenizer.save(folder)
    config = hf_config()
    tensors = export_hf(Qwen2VLConfig.from_hf(config), get_params(model))
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    preprocessor = {
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 1280,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [round(float(v), 8) for v in MEAN.astype(np.float64)],
        "image_std": [round(float(v), 8) for v in STD.astype(np.float64)],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "pad_token_id": config["bos_token_id"],
        "do_sample": False,
        "max_new_tokens": 16,
    }
    files = {"config": config, "preprocessor_config": preprocessor, "generation_config": generation}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
