"""InternVL: turn files, chat messages and pictures into token ids and patches.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.models import chat_files, image_settings
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.chat import ChatFolder, Message, check_count
from mquant_jax.models.images import load_frames, load_image
from mquant_jax.models.internvl.config import CHAT, InternVLConfig
from mquant_jax.models.internvl.processing import collate
from mquant_jax.models.internvl.tiles import MEAN, STD, Tiling
from mquant_jax.models.squares import patchify
from mquant_jax.schema import Schema, table, whole

START, CONTEXT, END = "<img>", "<IMG_CONTEXT>", "</img>"
MARKS = {"image": CONTEXT, "video": "<video>"}  # one per picture in a chat's text
_MARKED = re.compile("|".join(map(re.escape, MARKS.values())))
_STOP = "<|im_end|>"
_V2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_V2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
# Published prompt templates: system message, and end of a turn. "" is that of the native layout,
# for folders without a chat template.
_TEMPLATES = {
    "internlm2-chat": (_V2, _STOP),
    "Hermes-2": (_V2, _STOP),
    "internvl2_5": (_V2_5, f"{_STOP}\n"),
    "": (None, f"{_STOP}\n"),
}


_SIZE = Schema({"height": whole(low=1, high=2**13), "width": whole(low=1, high=2**13)})
_SETTINGS = Schema(
    {
        "size": table(None, null=True),
        "min_patches": whole(None, 1, 1024, null=True),
        "max_patches": whole(None, 1, 1024, null=True),
        "image_mean": image_settings.MEAN,
        "image_std": image_settings.STD,
    }
)


class InternVLProcessor(ChatFolder):
    """Turns pictures and text into a ``Batch``, and tokens into text.

    Args:
        folder: has tokenizer.json, in the native layout preprocessor_config.json, and optionally
            tokenizer_config.json, generation_config.json and a chat template.
        config: the model's config.

    Raises:
        UserError: a file is missing or unreadable, or the tokenizer belongs to another model.
    """

    config: InternVLConfig
    MARKS = ("<image>", *MARKS.values())

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer, with its special tokens checked."""
        tokenizer = super().tokenizer
        known = tokenizer.get_vocab()
        where = self.folder / "tokenizer.json"
        missing = [token for token in (START, CONTEXT, END) if token not in known]
        if missing:
            raise UserError(f"{where}: no token {missing[0]}; it belongs to another model")
        wanted, found = self.config.image_token_id, known[CONTEXT]
        if wanted not in (None, found):
            raise UserError(f"{where}: {CONTEXT} is token {found}, config.json has {wanted}")
        return tokenizer

    @property
    def image_token_id(self) -> int:
        """The placeholder's id."""
        return self.tokenizer.convert_tokens_to_ids(CONTEXT)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; in the published layout only that of its template."""
        stop = self.tokenizer.get_vocab().get(_STOP)
        return (stop,) if self.config.layout == CHAT and stop is not None else super().stop_ids

    @functools.cached_property
    def tiling(self) -> Tiling:
        """The tiling, from config.json or (native layout) preprocessor_config.json.

        transformers tiles pictures whatever the value of ``crop_to_patches``.

        Raises:
            UserError: the tile size is not a multiple of the model's patches.
        """
        c = self.config
        if c.layout == CHAT:
            return Tiling(c.tile_size, c.min_tiles, c.max_tiles, c.thumbnail)
        path, settings = chat_files.image_settings(self.folder)
        settings = _SETTINGS.read(settings, str(path))
        size = settings["size"] or {"height": c.tile_size, "width": c.tile_size}
        sides, unit = _SIZE.read(size, f"{path}: size"), c.patch_size * c.merge
        side = sides["height"]
        if side != sides["width"] or side % unit:
            raise UserError(f"{path}: size is {size}; expected a square, a multiple of {unit}")
        least, most = settings["min_patches"] or c.min_tiles, settings["max_patches"] or c.max_tiles
        if least > most:
            raise UserError(f"{path}: min_patches {least} is larger than max_patches {most}")
        return Tiling(
            side,
            least,
            most,
            c.thumbnail,
            settings["image_mean"] or MEAN,
            settings["image_std"] or STD,
        )

    def turn(self, text: str, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
        """Pictures come before the text, or where it has ``<image>`` or ``<video>``."""
        text, given = _inline(text), (("image", images), ("video", videos))
        content = [{"type": kind} for kind, some in given if MARKS[kind] not in text for _ in some]
        return [*content, {"type": "text", "text": text}]

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation, to be continued by the assistant.

        Args:
            messages: ``{"role": ..., "content": text or parts}``; a part is ``{"type": "text",
                "text": ...}``, ``{"type": "image"}`` or ``{"type": "video"}``. A text may contain
                ``<image>`` or ``<video>``.
            images, videos: in the order of their parts and placeholders.

        Raises:
            UserError: the number of pictures differs from that of placeholders; a picture
                cannot be read; a malformed message.
        """
        chat, images, videos = self.conversation(messages, images, videos)
        for part in (part for message in chat for part in message["content"]):
            if part["type"] == "text":
                part["text"] = _inline(part["text"])
        text = self._render(chat)
        given = {"image": images, "video": videos}
        for kind, pictures in given.items():
            found = text.count(MARKS[kind])
            check_count(f"the prompt has {found}", kind, found, pictures)
        return self._expand(text, {kind: iter(x) for kind, x in given.items()})

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""
        return collate(prompts, self.config, self.image_token_id, self.pad_id, pad_to)

    def _render(self, chat: list[dict[str, Any]]) -> str:
        """The chat's text with one mark per picture."""
        if self.config.layout != CHAT and self.chat_template is not None:
            return self.render(chat, self.chat_template)
        return render_published(chat, self.config.template)

    def _expand(self, text: str, pictures: Mapping[str, Iterator[Any]]) -> Prompt:
        """Replace marks by one placeholder per visual token, between tags."""
        tiling, tiles = self.tiling, list[tuple[str, Any]]()

        def place(match: re.Match[str]) -> str:
            kind = "image" if match[0] == CONTEXT else "video"
            name = f"{kind} {sum(k == kind for k, _ in tiles)}"
            tiles.append((kind, made := self._tiles(next(pictures[kind]), kind, name)))
            return "\n".join(
                (f"Frame{i}: " if kind == "video" else "") + START + CONTEXT * n + END
                for i, n in enumerate((len(x) * self._tile_tokens for x in made), 1)
            )

        text = _MARKED.sub(place, text)
        bos = self.tokenizer.bos_token
        begins = bool(bos) and text.startswith(bos)
        ids = self.rendered_ids(text, add_special_tokens=not begins)
        edge = tiling.size // self.config.patch_size
        pixels = [x for _, made in tiles for x in made]
        patches = [patchify(x, self.config.patch_size) for x in pixels]
        flat = [x.reshape(-1, x.shape[-1]) for x in patches]
        empty = np.zeros((0, self.config.vision.patch_dim), np.float32)
        return self.made(
            ids,
            [(len(x), edge, edge) for x in patches],
            np.concatenate([empty, *flat]),
        )

    @property
    def _tile_tokens(self) -> int:
        return (self.tiling.size // self.config.patch_size // self.config.merge) ** 2

    def _tiles(self, picture: Any, kind: str, name: str) -> list[np.ndarray]:
        """Tiles ``[n, 3, S, S]`` of a picture, or one tile of each frame of a clip."""
        if kind == "image":
            return [self.tiling.pixels(load_image(picture, name))]
        return [self.tiling.whole().pixels(frame) for frame in load_frames(picture, name)]


def _inline(text: str) -> str:
    """Replace ``<image>`` in a text by the mark that a chat template writes."""
    return text.replace("<image>", CONTEXT)


def render_published(chat: Sequence[Message], template: str) -> str:
    """Render a chat with one of InternVL's published templates.

    Args:
        chat: messages whose content is a list of parts.
        template: its name in config.json; "" for ChatML without a system message.

    Raises:
        UserError: an unknown template.
    """
    if template not in _TEMPLATES:
        known = ", ".join(t for t in _TEMPLATES if t)
        raise UserError(f"config.json: template {template!r} is not supported; known: {known}")
    system, end = _TEMPLATES[template]
    if system is not None and (not chat or chat[0]["role"] != "system"):
        chat = [{"role": "system", "content": [{"type": "text", "text": system}]}, *chat]
    turns = []
    for message in chat:
        parts = [
            part["text"] if part["type"] == "text" else MARKS[part["type"]] + "\n"
            for part in message["content"]
        ]
        turns.append(f"<|im_start|>{message['role']}\n{''.join(parts)}{end}")
    return "".join(turns) + "<|im_start|>assistant\n"
