"""LLaVA: turn files, chat messages and pictures into token ids and patches.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.files import read_json_if_any
from mquant_jax.models import chat_files
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.chat import ChatFolder, Message, check_count
from mquant_jax.models.images import load_image
from mquant_jax.models.llava.config import LlavaConfig
from mquant_jax.models.llava.pixels import SquarePictures
from mquant_jax.models.llava.processing import collate
from mquant_jax.models.squares import patchify
from mquant_jax.validate import shown

IMAGE = "<image>"
_PLACED = re.compile(r"<(image)>")
_PROBE = "What is this?"


class LlavaProcessor(ChatFolder):
    """Turns pictures and text into a ``Batch``, and tokens into text.

    Args:
        folder: has the tokenizer, and optionally preprocessor_config.json, processor_config.json,
            generation_config.json and a chat template.
        config: the model's config.

    Raises:
        UserError: a file is missing or unreadable, or the tokenizer belongs to another model.
    """

    config: LlavaConfig
    MARKS = (IMAGE,)

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer, with its placeholder checked."""
        tokenizer = super().tokenizer
        found, wanted = tokenizer.get_vocab().get(self.image_token), self.config.image_token_id
        if found != wanted:
            has = "no token" if found is None else f"token {found} for"
            raise UserError(f"{self.folder}: the tokenizer has {has} {shown(self.image_token)}; "
                            f"config.json has {wanted}")  # fmt: skip
        return tokenizer

    @functools.cached_property
    def image_token(self) -> str:
        """The text of the placeholder.

        Raises:
            UserError: its value in processor_config.json is not a text.
        """
        path = self.folder / chat_files.PROCESSOR
        found = read_json_if_any(path).get("image_token") or IMAGE
        if not isinstance(found, str):
            raise UserError(f"{path}: image_token {shown(found)}: expected a text")
        return found

    @functools.cached_property
    def pictures(self) -> SquarePictures:
        """Picture preprocessing by the folder's settings."""
        path, settings = chat_files.image_settings(self.folder)
        return SquarePictures(settings, path, self.config)

    @functools.cached_property
    def template_takes_parts(self) -> bool:
        """Whether the chat template places pictures; that of a text-only model does not."""
        template = self.chat_template
        if template is None:
            return False
        parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        try:
            text = self.render([{"role": "user", "content": parts}], template)
        except UserError:
            return False
        return self.image_token in text and _PROBE in text

    def turn(self, text: str, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
        """Pictures come before the text, or where it has ``<image>``."""
        pictures = [] if _PLACED.search(text) else images
        return super().turn(text, pictures, videos)

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation, to be continued by the assistant.

        Args:
            messages: ``{"role": ..., "content": text or parts}``; a part is ``{"type": "text",
                "text": ...}`` or ``{"type": "image"}``. A text may contain ``<image>``.
            images: in the order of their parts and placeholders.

        Raises:
            UserError: the number of pictures differs from that of placeholders; videos; a picture
                cannot be read; a malformed message.
        """
        chat, images, videos = self.conversation(messages, images, videos, _PLACED)
        kinds = [p["type"] for m in chat for p in m["content"] if p["type"] != "text"]
        if len(videos) or "video" in kinds:
            raise UserError("videos are not supported by this model; give frames as images")
        places = kinds.count("image")
        check_count(f"the prompt has {places}", "image", places, images)
        ids = self._ids(self._render(chat))
        found = ids.count(self.config.image_token_id)
        check_count(f"{self.folder}: the chat template made {found}", "image", found, images)
        return self._filled(ids, images)

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""
        return collate(self.config, prompts, self.pad_id, pad_to)

    def _render(self, chat: list[dict[str, Any]]) -> str:
        """The chat's text with one placeholder per picture."""
        if self.chat_template is None:
            return render_published(chat, self.image_token)
        if not self.template_takes_parts:
            chat = [{**m, "content": _inline(m, self.image_token)} for m in chat]
        return self.render(chat, self.chat_template)

    def _ids(self, text: str) -> list[int]:
        """Token ids; adds the tokens that begin a text, unless the template has done so."""
        begin = self.tokenizer.bos_token
        written = bool(begin) and text.startswith(begin)
        return self.rendered_ids(text, add_special_tokens=not written)

    def _filled(self, ids: Sequence[int], images: Sequence[Any]) -> Prompt:
        """Repeat each placeholder once per visual token of its picture."""
        c = self.config
        out: list[int] = []
        for token in ids:
            out.extend([token] * (c.image_tokens if token == c.image_token_id else 1))
        names = [f"image {i}" for i in range(len(images))]
        made = [
            self.pictures.pixels(load_image(x, name), name)
            for x, name in zip(images, names, strict=True)
        ]
        empty = np.zeros((0, c.vision.patch_dim), np.float32)
        patches = [patchify(x[None], c.patch_size)[0] for x in made]
        side = c.vision.position_grid
        return self.made(out, [(1, side, side)] * len(made), np.concatenate([empty, *patches]))


def render_published(chat: Sequence[Message], image: str = IMAGE) -> str:
    """The template that LLaVA 1.5 was released with, for folders without a template.

    Args:
        chat: messages whose content is a list of parts.
        image: placeholder of a picture.
    """
    turns = []
    for message in chat:
        role = "" if message["role"] == "system" else f"{message['role'].upper()}: "
        turns.append(f"{role}{_inline(message, image)} ")
    return "".join(turns) + "ASSISTANT:"


def _inline(message: Message, image: str) -> str:
    """A message's parts as one text, with each picture on its own line."""
    parts = message["content"]
    return "".join(p["text"] if p["type"] == "text" else f"{image}\n" for p in parts)
