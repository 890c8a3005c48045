"""What the processors of GLM-4V and CogVLM2 share: conversations about one picture."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
from mquant_jax.models.base import Prompt
from mquant_jax.models.chat import ChatFolder, Message, check_count, normalised
from mquant_jax.models.eva2 import EVA2Config
from mquant_jax.models.images import load_image
from mquant_jax.models.squares import patchify, squeeze

from mquant_jax.errors import UserError


class OnePictureChat(ChatFolder, abc.ABC):
    """A :class:`ChatFolder` of a model that takes one picture per conversation."""

    @abc.abstractmethod
    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation as a prompt; a family's own format.

        Raises:
            UserError: as :meth:`checked`.
        """

    def prompt(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Prompt:
        """One user turn.

        Args:
            text: the picture stands in front of it.
            images: none or one: a PIL image, a uint8 ``[H, W, 3]`` array or a path.
            videos: none.

        Raises:
            UserError: as ``messages``.
        """
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        return self.messages([{"role": "user", "content": content}], images, videos)

    def checked(
        self, messages: Sequence[Message], images: Sequence[Any], videos: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """The messages with their content as parts.

        Raises:
            UserError: pictures and places differ in number; several pictures, or videos, or a
                picture for a model that takes none; a malformed message.
        """
        chat = [normalised(message, i, None) for i, message in enumerate(messages)]
        kinds = [part["type"] for message in chat for part in message["content"]]
        if "video" in kinds or len(videos):
            raise UserError(f"{self.folder}: this model takes no videos")
        places = kinds.count("image")
        check_count(f"the prompt has {places}", "image", places, images)
        if places and self.config.vision is None:
            raise UserError(f"{self.folder}: this is a language model without a vision part; "
                            "leave the picture out")  # fmt: skip
        if places > 1:
            raise UserError(f"{self.folder}: this model takes one picture per conversation, "
                            f"{places} were given")  # fmt: skip
        return chat


def text_of(message: dict[str, Any]) -> str:
    """The text parts of a message together."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def pixels_of(
    c: EVA2Config | None, images: Sequence[Any]
) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """Grids, and patches float32 ``[pictures * side^2, patch_dim]``.

    Raises:
        UserError: a picture that cannot be read.
    """
    if len(images) == 0 or c is None:
        return [], np.zeros((0, 0), np.float32)
    pixels = [squeeze(load_image(x, f"image {i}"), c.image_size) for i, x in enumerate(images)]
    patches = patchify(np.stack(pixels), c.patch_size)
    return [(1, c.side, c.side)] * len(pixels), patches.reshape(-1, patches.shape[-1])
