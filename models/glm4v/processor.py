"""GLM-4V: turn files, chat messages and a picture into token ids and patches.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.files import is_file
from mquant_jax.models import chat_files
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.chat import Message, import_transformers, text_of
from mquant_jax.models.eva2 import VISUAL
from mquant_jax.models.eva2_chat import OnePictureChat, pixels_of
from mquant_jax.models.glm4v.config import GLM4VConfig
from mquant_jax.models.glm4v.processing import collate
from mquant_jax.models.tiktoken import build_tokenizer, read_ranks
from mquant_jax.validate import text as checked_text

# The tokenizer's word pattern, which only the published code has.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROLES = ("system", "user", "assistant", "observation")
BOI, EOI, END = "<|begin_of_image|>", "<|end_of_image|>", "<|endoftext|>"
_PREFIX = ("[gMASK]", "<sop>")
# Special tokens in the order of their ids, after the ordinary ones, if no file lists them.
_SPECIAL = (
    END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *(f"<|{role}|>" for role in ROLES),
    BOI, EOI, "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip


class GLM4VProcessor(OnePictureChat):
    """Turns a picture and text into a ``Batch``, and tokens into text.

    Args:
        folder: holds tokenizer.model (tiktoken) or tokenizer.json, and as published
            tokenizer_config.json and generation_config.json.
        config: the model's config.

    Raises:
        UserError: a file is missing or unreadable, or the tokenizer belongs to another model.
    """

    config: GLM4VConfig
    ROLES = ROLES
    SPELLED = False  # so that a text cannot end its turn

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer, with its special tokens checked."""
        if is_file(self.folder / "tokenizer.json"):
            tokenizer = super().tokenizer
        else:
            path = self.folder / "tokenizer.model"
            ranks = read_ranks(path)
            added = chat_files.added_tokens(self.folder)
            special = {token: len(ranks) + i for i, token in enumerate(_SPECIAL)}
            if added:
                special = {token["content"]: i for i, token in added.items()}
            kind = import_transformers().PreTrainedTokenizerFast
            with chat_files.loading(path):
                raw = build_tokenizer(ranks, PATTERN, special)
                tokenizer = kind(tokenizer_object=raw, eos_token=END, pad_token=END)
        known = tokenizer.get_vocab()
        c, needed = self.config, [*_PREFIX, *(f"<|{role}|>" for role in ROLES)]
        wanted = {BOI: c.boi, EOI: c.eoi} if c.vision else {}
        for token in (*needed, *wanted):
            if token not in known:
                raise UserError(f"{self.folder}: the tokenizer has no token {token}; "
                                "it belongs to another model")  # fmt: skip
        for token, i in wanted.items():
            if known[token] != i:
                raise UserError(f"{self.folder}: {token} is token {known[token]}, "
                                f"config.json has {i}")  # fmt: skip
        return tokenizer

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation, to be continued by the assistant.

        Args:
            messages: ``{"role": ..., "content": text or parts}``, with an optional ``"metadata"``
                text after the role; a part is ``{"type": "text", "text": ...}`` or
                ``{"type": "image"}``. A message's picture comes before its text, wherever its
                part is. Empty messages are skipped.
            images: the picture, if a message has one.

        Raises:
            UserError: the number of pictures differs from that of placeholders; several
                pictures, or videos; a picture cannot be read; a malformed message.
        """
        messages = list(messages) if isinstance(messages, Iterable) else messages
        chat, images = self.checked(messages, images, videos)
        token = self.tokenizer.convert_tokens_to_ids
        ids = token(list(_PREFIX))
        for i, (message, given) in enumerate(zip(chat, messages, strict=True)):
            if given.get("tools"):
                raise UserError(f"message {i}: tools are not supported; describe them in the text")
            text = text_of(message)
            picture = any(p["type"] == "image" for p in message["content"])
            if not text and not picture:
                continue
            # Pieces are encoded separately, so that a text's first line break stays separate.
            metadata = checked_text(given.get("metadata", ""), f"message {i}: metadata")
            ids += [token(f"<|{message['role']}|>"), *self.rendered_ids(f"{metadata}\n")]
            ids += [VISUAL] * self.config.tower.tokens if picture else []
            ids += self.rendered_ids(text)
        ids.append(token("<|assistant|>"))
        return self.made(ids, *pixels_of(self.config.vision, images))

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""
        return collate(self.config, prompts, self.pad_id, pad_to)
