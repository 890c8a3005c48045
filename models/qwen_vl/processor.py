"""Qwen-VL: turn files, chat messages and pictures into token ids and patches.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.files import is_file, read_json_if_any
from mquant_jax.models import chat_files
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.chat import (
    ChatFolder,
    Message,
    check_count,
    import_transformers,
)
from mquant_jax.models.images import load_image
from mquant_jax.models.qwen_vl.config import QwenVLConfig
from mquant_jax.models.qwen_vl.processing import VISUAL, collate, picture_ids
from mquant_jax.models.squares import patchify, squeeze
from mquant_jax.models.tiktoken import build_tokenizer, read_ranks
from mquant_jax.schema import Schema, choice, whole

# The tokenizer's word pattern, which only the published code has.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARK = "<img></img>"  # a picture's mark in a text; a file name inside is ignored
_PLACED = re.compile(r"<img>.*?</img>", re.DOTALL)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CHAT = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))
IMG, IMG_END, IMG_PAD = "<img>", "</img>", "<imgpad>"
# These are also special in a text. Those of a chat are not, so that no text can end its turn.
_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", IMG, IMG_END, IMG_PAD)
_TAG = re.compile(f"({'|'.join(map(re.escape, _TAGS))})")
_SYSTEM = "You are a helpful assistant."
_SETTINGS = Schema(
    {
        "chat_format": choice("chatml", ("chatml", "raw")),
        # Context length beyond which the oldest turns are dropped.
        "max_window_size": whole(6144, 1),
    }
)


class QwenVLProcessor(ChatFolder):
    """Turns pictures and text into a ``Batch``, and tokens into text.

    Args:
        folder: has qwen.tiktoken (or tokenizer.json), and optionally generation_config.json.
        config: the model's config.

    Raises:
        UserError: a file is missing or unreadable, or the tokenizer belongs to another model.
    """

    config: QwenVLConfig
    PLACEHOLDER = VISUAL
    SPELLED = False
    MARKS = (MARK,)
    NEEDED = ("qwen.tiktoken",)
    INSTEAD = {"qwen.tiktoken": ("tokenizer.json",)}

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer, with its special tokens checked."""
        path = self.folder / self.NEEDED[0]
        if is_file(path):
            ranks = read_ranks(path)
            special = {token: len(ranks) + i for i, token in enumerate((*_CHAT, *_TAGS))}
            kind = import_transformers().PreTrainedTokenizerFast
            with chat_files.loading(path):
                raw = build_tokenizer(ranks, PATTERN, special)
                tokenizer = kind(tokenizer_object=raw, pad_token=END_OF_TEXT)
        else:
            path, tokenizer = self.folder / "tokenizer.json", super().tokenizer
        known, c = tokenizer.get_vocab(), self.config
        ids = {IMG: c.image_start_id, IMG_END: c.image_end_id, IMG_PAD: c.image_pad_id}
        for token in (END_OF_TEXT, IM_START, IM_END, *ids):
            if token not in known:
                raise UserError(f"{path}: no token {token}; it belongs to another model")
            if known[token] != ids.get(token, known[token]):
                raise UserError(f"{path}: {token} is token {known[token]}, "
                                f"config.json has {ids[token]}")  # fmt: skip
        return tokenizer

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Settings in generation_config.json.

        Raises:
            UserError: an unknown prompt format.
        """
        path = self.folder / "generation_config.json"
        return _SETTINGS.read(read_json_if_any(path), str(path))

    @property
    def is_chat(self) -> bool:
        """Whether prompts are chat turns, rather than texts to be continued (Qwen-VL)."""
        return self.settings["chat_format"] == "chatml"

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, as in the published code."""
        stops = (IM_END, IM_START, END_OF_TEXT) if self.is_chat else (END_OF_TEXT,)
        return tuple(self.tokenizer.convert_tokens_to_ids(list(stops)))

    @functools.cached_property
    def _chat_ids(self) -> set[int]:
        """Special tokens that are removed from answers."""
        known = self.tokenizer.get_vocab()
        return {known[token] for token in _CHAT if token in known}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, in which only tags (``<ref>``, ``<box>``, ...) are special."""
        ids: list[int] = []
        for i, part in enumerate(_TAG.split(unicodedata.normalize("NFC", text))):
            if i % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                ids += super().encode(part)
        return ids

    def rendered_ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """See :class:`ChatFolder`; the text is NFC-composed first, as in :meth:`encode`."""
        return super().rendered_ids(unicodedata.normalize("NFC", text), add_special_tokens)

    @property
    def shown_tokens(self) -> list[str]:
        """Answers contain the tags of boxes."""
        return [tag for tag in _TAGS if tag not in (IMG, IMG_END, IMG_PAD)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, stripped, with tags but without a chat's special tokens."""
        kept = [int(i) for i in ids if int(i) not in self._chat_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=False).strip()

    def turn(self, text: str, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
        """Pictures come before the text, or where it has ``<img></img>`` (a file name inside, as in
        published prompts, is ignored)."""
        return super().turn(text, [] if _PLACED.search(text) else images, videos)

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation, to be continued by the assistant.

        The oldest turns, with their pictures, are dropped if the conversation exceeds the window in
        generation_config.json (6144 tokens).

        Args:
            messages: ``{"role": ..., "content": text or parts}``; a part is ``{"type": "text",
                "text": ...}`` or ``{"type": "image"}``, which is numbered within its message and
                put on its own line. A text that contains ``<img></img>`` is not changed.
            images: in the order of their parts and placeholders.

        Raises:
            UserError: the number of pictures differs from that of placeholders; a picture cannot
                be read; a malformed message, or unpaired tags; videos; several messages for a
                model that is not a chat model.
        """
        chat, images, videos = self.conversation(messages, images, videos)
        parts = [part for message in chat for part in message["content"]]
        if len(videos) or any(part["type"] == "video" for part in parts):
            raise UserError(f"{self.folder}: Qwen-VL has no videos; give frames as images")
        texts = [_text(message["content"]) for message in chat]
        counts = [len(_PLACED.findall(text)) for text in texts]
        check_count(f"the prompt has {sum(counts)}", "image", sum(counts), images)
        if self.is_chat:
            roles = [message["role"] for message in chat]
            ids, kept = self._chat(list(zip(roles, texts, strict=True)))
        else:
            if [message["role"] for message in chat] != ["user"]:
                raise UserError(f"{self.folder}: this is not a chat model; "
                                "expected one user message")  # fmt: skip
            ids, kept = self._with_pictures(0, texts[0]), [0]
        owners = np.repeat(np.arange(len(chat)), counts)
        seen = [i for i, owner in enumerate(owners) if owner in kept]
        return self.made(ids, *self._pictures({i: images[i] for i in seen}))

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""
        return collate(self.config, prompts, pad_to)

    def _chat(self, chat: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids of roles and texts, and the indices of the messages that fit."""
        first = 1 if chat and chat[0][0] == "system" else 0
        newline = self.encode("\n")
        head = self._message(0, "system", chat[0][1] if first else _SYSTEM)
        turns: list[list[int]] = []  # a user message and what follows it
        for i in range(first, len(chat)):
            if chat[i][0] == "user" or not turns:
                turns.append([])
            turns[-1].append(i)

        def written(turn: Sequence[int]) -> list[int]:
            return [t for i in turn for t in newline + self._message(i, *chat[i])]

        last = turns.pop() if turns else []
        context: list[int] = []
        kept = [*range(first), *last]
        for turn in reversed(turns):
            ids = written(turn)
            if len(head) + len(ids) + len(context) >= self.settings["max_window_size"]:
                break
            context, kept = ids + context, kept + turn
        start = self.tokenizer.convert_tokens_to_ids(IM_START)
        answer = [*newline, start, *self.encode("assistant"), *newline]
        return head + context + written(last) + answer, kept

    def _message(self, number: int, role: str, text: str) -> list[int]:
        """Token ids of one message; role, newline and text are tokenized separately."""
        start, end = self.tokenizer.convert_tokens_to_ids([IM_START, IM_END])
        text_ids = self._with_pictures(number, text)
        return [start, *self.encode(role), *self.encode("\n"), *text_ids, end]

    def _with_pictures(self, number: int, text: str) -> list[int]:
        """Token ids of a message's text, with a placeholder per visual token."""
        c, out, is_open = self.config, [], False
        for token in self.rendered_ids(_PLACED.sub(MARK, text)):
            if is_open != (token == c.image_end_id):
                raise UserError(f"message {number}: {IMG} and {IMG_END} do not pair up")
            is_open = token == c.image_start_id
            if token == c.image_end_id:
                out += picture_ids(c)
            elif not is_open:
                out.append(token)
        if is_open:
            raise UserError(f"message {number}: {IMG} and {IMG_END} do not pair up")
        return out

    def _pictures(self, images: Mapping[int, Any]) -> tuple[list[tuple[int, int, int]], np.ndarray]:
        """Grids, and patches float32 ``[pictures * side^2, patch_dim]``; images by their index."""
        c = self.config
        squares = [squeeze(load_image(x, f"image {i}"), c.image_size) for i, x in images.items()]
        if not squares:
            return [], np.zeros((0, c.vision.patch_dim), np.float32)
        patches = patchify(np.stack(squares), c.patch_size)
        return [(1, c.side, c.side)] * len(squares), patches.reshape(-1, c.vision.patch_dim)


def _text(parts: Sequence[Mapping[str, Any]]) -> str:
    """A message's parts in the published format, with numbered pictures on their own lines."""
    out, count = "", 0
    for part in parts:
        if part["type"] == "image":
            count += 1
            out += f"Picture {count}: {MARK}\n"
        else:
            out += part["text"]
    return out
