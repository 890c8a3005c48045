"""Qwen2-VL: turn files, chat messages and pictures into token ids and patches.

Uses only the image processor (PIL backend) and the tokenizer of transformers, whose combined
processor needs torch. Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mquant_jax.errors import UserError
from mquant_jax.models import chat_files
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.chat import ChatFolder, Message, check_count, import_transformers
from mquant_jax.models.image_settings import agree, read_area
from mquant_jax.models.images import load_frames, load_image
from mquant_jax.models.qwen2_vl.config import Qwen2VLConfig
from mquant_jax.models.qwen2_vl.processing import Grid, collate
from mquant_jax.schema import Schema, real

START, END = "<|vision_start|>", "<|vision_end|>"
PLACEHOLDERS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
# A placeholder in a text, bare or already between its markers.
PLACED = re.compile(rf"(?:{re.escape(START)})?<\|(image|video)_pad\|>(?:{re.escape(END)})?")
_PATCHES = ("patch_size", "temporal_patch_size", "merge_size")
_RATE = Schema({"fps": real(2.0, 0.0, 1000.0, above=True, null=True)})
_VIDEOS = "video_preprocessor_config.json"
Picture = tuple[Grid, np.ndarray, float]  # with the seconds between its temporal patches


class Qwen2VLProcessor(ChatFolder):
    """Turns pictures and text into a ``Batch``, and tokens into text.

    Args:
        folder: has a tokenizer, preprocessor_config.json or processor_config.json, and optionally
            tokenizer_config.json, generation_config.json and a chat template.
        config: the model's config.

    Raises:
        UserError: a file is missing or unreadable, or the tokenizer belongs to another model.
    """

    config: Qwen2VLConfig
    MARKS = tuple(PLACEHOLDERS.values())
    # The first message of a conversation without one, in folders that carry no template.
    SYSTEM: ClassVar[str | None] = "You are a helpful assistant."
    NEEDED = ("tokenizer.json", chat_files.PREPROCESSOR)
    INSTEAD = {**ChatFolder.INSTEAD, chat_files.PREPROCESSOR: (chat_files.PROCESSOR,)}

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer, with its placeholder ids checked against the config."""
        tokenizer = super().tokenizer
        expected = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        for kind, token in PLACEHOLDERS.items():
            found = tokenizer.convert_tokens_to_ids(token)
            if found != expected[kind]:
                raise UserError(
                    f"{self.folder / 'tokenizer.json'}: {token} is token {found}, "
                    f"config.json has {expected[kind]}"
                )
        return tokenizer

    @functools.cached_property
    def image_processor(self):
        """The folder's image processor, checked against the config's patch sizes."""
        return self._processor_of(*chat_files.image_settings(self.folder))

    @functools.cached_property
    def video_processor(self):
        """The same for frames of videos, which may have bounds of their own."""
        path, settings = self.video_settings
        return self._processor_of(path, settings) if settings else self.image_processor

    @functools.cached_property
    def video_settings(self) -> tuple[Path, dict[str, Any]]:
        """How frames are prepared, and the file that says so; empty where none does."""
        return chat_files.settings_of(self.folder, _VIDEOS, "video_processor")

    @functools.cached_property
    def seconds_per_grid(self) -> float:
        """Time from one temporal patch of a clip to the next; clips are taken to be sampled at the
        folder's ``fps``, as published 2 frames a second."""
        path, settings = self.video_settings
        return self.config.temporal_patch_size / _RATE.read(settings, str(path))["fps"]

    def _processor_of(self, path: Path, settings: dict[str, Any]):
        return import_transformers().Qwen2VLImageProcessorPil(**self.area(path, settings))

    def area(self, path: Path, settings: dict[str, Any]) -> dict[str, Any]:
        """How a file has pictures or frames prepared, checked against the config's patch sizes."""
        read = read_area(settings, path)
        agree(path, read, {k: getattr(self.config, k) for k in _PATCHES})
        return read

    def turn(self, text: str, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
        """Pictures stand in front of the text, or where it says ``<|image_pad|>`` or
        ``<|video_pad|>`` (with or without the markers around)."""
        placed = [m[1] for m in PLACED.finditer(text)]
        given = (("image", images), ("video", videos))
        content = [{"type": kind} for kind, some in given if kind not in placed for _ in some]
        return [*content, {"type": "text", "text": text}]

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation, to be continued by the assistant.

        Args:
            messages: ``{"role": ..., "content": text or parts}``; a part is ``{"type": "text",
                "text": ...}``, ``{"type": "image"}`` or ``{"type": "video"}``.
            images, videos: in the order of their parts and placeholders.

        Raises:
            UserError: the number of pictures differs from that of placeholders; a picture
                cannot be read; a malformed message.
        """
        chat, images, videos = self.conversation(messages, images, videos, PLACED)
        kinds = [p["type"] for m in chat for p in m["content"] if p["type"] != "text"]
        given = {"image": images, "video": videos}
        for kind, pictures in given.items():
            check_count(f"the prompt has {kinds.count(kind)}", kind, kinds.count(kind), pictures)
        clips = [self._video(x, i) for i, x in enumerate(videos)]
        text, clips = self.timed(self._render(chat), clips, [len(x) for x in videos])
        ids = self.rendered_ids(text)
        made = {
            self.config.image_token_id: [self._image(x, i) for i, x in enumerate(images)],
            self.config.video_token_id: clips,
        }
        for kind, (token, pictures) in zip(given, made.items(), strict=True):
            self.check_made(ids.count(token), kind, pictures)
        return self._expand(ids, {token: iter(x) for token, x in made.items()})

    def timed(
        self, text: str, clips: list[Picture], frames: Sequence[int]
    ) -> tuple[str, list[Picture]]:
        """A rendered chat, and its clips as the placeholders in the text stand for them.

        ``frames``: how many each clip has.
        """
        return text, clips

    def check_made(self, found: int, kind: str, pictures: Sequence[Any]) -> None:
        """
        Raises:
            UserError: a rendered chat does not have a placeholder for each picture.
        """
        check_count(f"{self.folder}: the chat template made {found}", kind, found, pictures)

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""
        return collate(prompts, self.config, self.pad_id, pad_to)

    def _render(self, chat: list[dict[str, Any]]) -> str:
        if self.chat_template is None:
            return render_published(chat, self.SYSTEM)
        return self.render(chat, self.chat_template)

    def _expand(self, ids: Sequence[int], pictures: Mapping[int, Iterator[Picture]]) -> Prompt:
        """Repeat each placeholder once per visual token of its picture."""
        out: list[int] = []
        used: list[Picture] = []
        for token in ids:
            repeats = 1
            if token in pictures:
                used.append(next(pictures[token]))
                repeats = int(np.prod(used[-1][0])) // self.config.merge_size**2
            out.extend([token] * repeats)
        patches = [np.zeros((0, self.config.vision.patch_dim), np.float32)]
        patches.extend(part for _, part, _ in used)
        grids, seconds = [grid for grid, _, _ in used], [step for _, _, step in used]
        return self.made(out, grids, np.concatenate(patches), seconds)

    def _frames(
        self, frames: list[Image.Image], name: str, processor: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Patches of pictures, each processed as a still: float32 ``[sum(h*w), patch_dim]``; and
        grids."""
        try:
            out = processor(images=frames, return_tensors="np")
        except ValueError as e:
            raise UserError(f"{name}: {e}") from e
        return np.asarray(out["pixel_values"], np.float32), np.asarray(out["image_grid_thw"])

    def _image(self, image: Any, index: int) -> Picture:
        patches, grids = self._frames(
            [load_image(image, f"image {index}")], f"image {index}", self.image_processor
        )
        return _grid(grids[0]), patches, 1.0

    def _video(self, video: Sequence[Any], index: int) -> Picture:
        """A clip: the last frame is repeated until temporal patches are full."""
        name = f"video {index}"
        frames = load_frames(video, name)
        sizes = {f.size for f in frames}
        if len(sizes) > 1:
            raise UserError(f"{name}: frames differ in size: {sorted(sizes)}")
        slots = self.config.temporal_patch_size
        stills, grids = self._frames(self.sized(frames), name, self.video_processor)
        _, h, w = _grid(grids[0])
        size = self.config.patch_size
        # A still repeats the picture in every temporal slot: take one slot per frame.
        stills = stills.reshape(len(frames), h * w, 3, slots, size, size)[:, :, :, 0]
        padding = np.repeat(stills[-1:], -len(frames) % slots, axis=0)
        clip = np.concatenate([stills, padding])
        clip = clip.reshape(-1, slots, *clip.shape[1:]).transpose(0, 2, 3, 1, 4, 5)
        patches = np.ascontiguousarray(clip).reshape(-1, 3 * slots * size**2)
        return (len(clip), h, w), patches, self.seconds_per_grid

    def sized(self, frames: list[Image.Image]) -> list[Image.Image]:
        """A clip's frames as the image processor takes them."""
        return frames


def render_published(chat: Sequence[Message], system: str | None) -> str:
    """The template that these models were released with, for folders that carry none.

    Args:
        chat: messages whose content is a list of parts.
        system: the first message, unless ``chat`` has one.
    """
    if system is not None and chat and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": [{"type": "text", "text": system}]}, *chat]
    turns = []
    for message in chat:
        parts = [
            part["text"] if part["type"] == "text" else START + PLACEHOLDERS[part["type"]] + END
            for part in message["content"]
        ]
        turns.append(f"<|im_start|>{message['role']}\n{''.join(parts)}<|im_end|>\n")
    return "".join(turns) + "<|im_start|>assistant\n"


def _grid(row: np.ndarray) -> Grid:
    t, h, w = (int(n) for n in row)
    return t, h, w
