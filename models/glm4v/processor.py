"""GLM-4V: files, chat messages and a picture in; token ids and patches out.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.base import Batch, Prompt
from models.chat import ChatFolder, Message, check_count, import_transformers, normalised, read_json
from models.eva2 import VISUAL
from models.glm4v.config import GLM4VConfig
from models.glm4v.processing import collate
from models.images import load_image
from models.squares import patchify, squeeze
from models.tiktoken import build_tokenizer, read_ranks
from mquant_jax.errors import UserError

# What a word is to the tokenizer; in the published code, and in no file.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROLES = ("system", "user", "assistant", "observation")
BOI, EOI, END = "<|begin_of_image|>", "<|end_of_image|>", "<|endoftext|>"
_PREFIX = ("[gMASK]", "<sop>")
# Special tokens in the order of their ids, behind the ordinary ones, where no file tells them.
_SPECIAL = (
    END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *(f"<|{role}|>" for role in ROLES),
    BOI, EOI, "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip


class GLM4VProcessor(ChatFolder):
    """From a picture and text to a ``Batch``, and from tokens back to text.

    Args:
        folder: holds tokenizer.model (tiktoken) or tokenizer.json, and as published
            tokenizer_config.json and generation_config.json.
        config: the model's config.

    Raises:
        UserError: a file is missing or unreadable, or the tokenizer is of another model.
    """

    config: GLM4VConfig

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer, its special tokens checked."""
        if (self.folder / "tokenizer.json").is_file():
            tokenizer = super().tokenizer
        else:
            ranks = read_ranks(self.folder / "tokenizer.model")
            added = read_json(self.folder / "tokenizer_config.json").get("added_tokens_decoder")
            special = {token: len(ranks) + i for i, token in enumerate(_SPECIAL)}
            if added:
                special = {token["content"]: int(i) for i, token in added.items()}
            raw = build_tokenizer(ranks, PATTERN, special)
            kind = import_transformers().PreTrainedTokenizerFast
            tokenizer = kind(tokenizer_object=raw, eos_token=END, pad_token=END)
        known = tokenizer.get_vocab()
        c, needed = self.config, [*_PREFIX, *(f"<|{role}|>" for role in ROLES)]
        wanted = {BOI: c.boi, EOI: c.eoi} if c.vision else {}
        for token in (*needed, *wanted):
            if token not in known:
                raise UserError(f"{self.folder}: the tokenizer has no token {token}; "
                                "it is of another model")  # fmt: skip
        for token, i in wanted.items():
            if known[token] != i:
                raise UserError(f"{self.folder}: {token} is token {known[token]}, "
                                f"config.json says {i}")  # fmt: skip
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, in which nothing is special: a text cannot end its turn."""
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )

    def prompt(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Prompt:
        """One user turn.

        Args:
            text: the picture stands in front of it.
            images: none or one: a PIL image, a uint8 ``[H, W, 3]`` array or a path.
            videos: none.

        Raises:
            UserError: as :meth:`messages`.
        """
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        return self.messages([{"role": "user", "content": content}], images, videos)

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A whole conversation, answered next by the assistant.

        Args:
            messages: ``{"role": ..., "content": text or parts}``, with a ``"metadata"`` text if
                the role has any; a part is ``{"type": "text", "text": ...}`` or
                ``{"type": "image"}``. A message's picture stands in front of its text, wherever
                its part is. Messages of nothing are left out.
            images: the picture, if a message has one.

        Raises:
            UserError: pictures and places differ in number; several pictures, or videos, which
                the model does not take; a picture that cannot be read; a malformed message.
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
        token = self.tokenizer.convert_tokens_to_ids
        ids = token(list(_PREFIX))
        for i, (message, given) in enumerate(zip(chat, messages, strict=True)):
            if message["role"] not in ROLES:
                raise UserError(f"message {i}: role {message['role']!r} is not one of "
                                f"{', '.join(ROLES)}")  # fmt: skip
            if given.get("tools"):
                raise UserError(f"message {i}: tools are not supported; say them in the text")
            text = "".join(p["text"] for p in message["content"] if p["type"] == "text")
            picture = any(p["type"] == "image" for p in message["content"])
            if not text and not picture:
                continue
            # Each piece is encoded on its own: a text's first line break joins no other.
            ids += [token(f"<|{message['role']}|>"), *self.encode(f"{given.get('metadata', '')}\n")]
            ids += [VISUAL] * self.config.vision.tokens if picture else []
            ids += self.encode(text)
        ids.append(token("<|assistant|>"))
        return Prompt(ids, *self._pictures(images))

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""
        return collate(self.config, prompts, self.pad_id, pad_to)

    def _pictures(self, images: Sequence[Any]) -> tuple[list[tuple[int, int, int]], np.ndarray]:
        """Grids, and patches float32 ``[pictures * side^2, patch_dim]``."""
        c = self.config.vision
        pixels = [squeeze(load_image(x, f"image {i}"), c.image_size) for i, x in enumerate(images)]
        if not pixels:
            return [], np.zeros((0, 0), np.float32)
        patches = patchify(np.stack(pixels), c.patch_size)
        return [(1, c.side, c.side)] * len(pixels), patches.reshape(-1, patches.shape[-1])
