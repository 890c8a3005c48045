"""Shared by the processors of GLM-4V and CogVLM2: conversations about one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.models.chat import ChatFolder, Message, check_count
from mquant_jax.models.eva2 import VISUAL, EVA2Config
from mquant_jax.models.images import load_image
from mquant_jax.models.squares import patchify, squeeze


class OnePictureChat(ChatFolder):
    """A :class:`ChatFolder` of a model that takes one picture per conversation."""

    PLACEHOLDER = VISUAL

    def checked(
        self, messages: Sequence[Message], images: Sequence[Any], videos: Sequence[Any]
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """The messages with their content as parts, and the pictures.

        Raises:
            UserError: the number of pictures differs from the number of placeholders; several
                pictures, videos, or a picture for a text-only model; a malformed message.
        """
        chat, images, videos = self.conversation(messages, images, videos)
        kinds = [part["type"] for message in chat for part in message["content"]]
        if "video" in kinds or len(videos):
            raise UserError(f"{self.folder}: this model does not support videos")
        places = kinds.count("image")
        check_count(f"the prompt has {places}", "image", places, images)
        if places and self.config.vision is None:
            raise UserError(f"{self.folder}: this is a text-only model; remove the "
                            "picture")  # fmt: skip
        if places > 1:
            raise UserError(f"{self.folder}: this model supports one picture per conversation, "
                            f"found {places}")  # fmt: skip
        return chat, images


def pixels_of(
    c: EVA2Config | None, images: Sequence[Any]
) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """Grids, and patches float32 ``[pictures * side^2, patch_dim]``.

    Raises:
        UserError: a picture cannot be read.
    """
    if len(images) == 0 or c is None:
        return [], np.zeros((0, 0), np.float32)
    pixels = [squeeze(load_image(x, f"image {i}"), c.image_size) for i, x in enumerate(images)]
    patches = patchify(np.stack(pixels), c.patch_size)
    return [(1, c.side, c.side)] * len(pixels), patches.reshape(-1, patches.shape[-1])
