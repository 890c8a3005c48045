"""CogVLM2: turn files, chat messages and a picture into token ids and patches.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.chat import Message, text_of
from mquant_jax.models.cogvlm2.config import CogVLM2Config
from mquant_jax.models.cogvlm2.processing import collate
from mquant_jax.models.eva2 import VISUAL
from mquant_jax.models.eva2_chat import OnePictureChat, pixels_of

_ANSWER = {"chat": "Answer:", "vqa": "Short answer:"}


class CogVLM2Processor(OnePictureChat):
    """Turns a picture and text into a ``Batch``, and tokens into text.

    Args:
        folder: holds tokenizer.json, and as published tokenizer_config.json and
            generation_config.json.
        config: the model's config.

    Raises:
        UserError: a file is missing or unreadable, or the tokenizer belongs to another model.
    """

    config: CogVLM2Config

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer, which must have a bos_token."""
        tokenizer = super().tokenizer
        if tokenizer.bos_token_id is None:
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: no bos_token; "
                            "the tokenizer belongs to another model")  # fmt: skip
        return tokenizer

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation, to be continued by the assistant.

        Args:
            messages: ``{"role": ..., "content": text or parts}``, alternating between ``user`` and
                ``assistant``; a part is ``{"type": "text", "text": ...}`` or
                ``{"type": "image"}``. The picture comes before the whole conversation, wherever
                its part is.
            images: the picture, if a message has one.

        Raises:
            UserError: the number of pictures differs from that of placeholders; several
                pictures, or videos; a picture cannot be read; a malformed message.
        """
        chat, images = self.checked(messages, images, videos)
        for i, message in enumerate(chat):
            wanted = ("user", "assistant")[i % 2]
            if message["role"] != wanted:
                raise UserError(f"message {i}: role {message['role']!r}, expected {wanted!r}: "
                                "turns must alternate, without other roles")  # fmt: skip
        if len(chat) % 2 == 0:
            raise UserError("the conversation must end with a message of role 'user'")
        ids = [self.tokenizer.bos_token_id]
        ids += [VISUAL] * (len(images) * self.config.vision.tokens)
        texts = [text_of(message) for message in chat]
        ids += self.rendered_ids(render(texts, self.config.template))
        return self.made(ids, *pixels_of(self.config.vision, images))

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """See :class:`ChatFolder`. The model has no system role: a system message becomes the first
        line of the first question."""
        return super().chat(_without_system(messages))

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts and pack their pictures into one :class:`Batch`."""
        return collate(self.config, prompts, pad_to)


def _without_system(messages: Any) -> Any:
    """The conversation with its system message moved to the start of the first question."""
    if not isinstance(messages, list | tuple) or len(messages) < 2:
        return messages
    system, question = _parts(messages[0], "system"), _parts(messages[1], "user")
    if system is None or question is None:
        return messages
    newline = {"type": "text", "text": "\n"}
    return [{**messages[1], "content": [*system, newline, *question]}, *messages[2:]]


def _parts(message: Any, role: str) -> list[Any] | None:
    """The content of a message of this role as a list; ``None`` if it is malformed."""
    if not isinstance(message, Mapping) or message.get("role") != role:
        return None
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, list | tuple) else None


def render(texts: Sequence[str], template: str) -> str:
    """The published prompt of a conversation.

    Args:
        texts: alternating questions and answers, ending with a question.
        template: ``chat``, ``vqa``, or ``base`` (only the last question, unchanged).
    """
    if template == "base":
        return texts[-1]
    answer = _ANSWER[template]
    out = ""
    for question, said in zip(texts[:-1:2], texts[1::2], strict=True):
        out += f"Question: {question} {answer} {said}\n"
    return f"{out}Question: {texts[-1]} {answer}"
