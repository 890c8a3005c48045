"""Llama and Qwen2: turn chat messages into token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.chat import ChatFolder, Message, text_of
from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.llama.processing import batch_of
from mquant_jax.validate import listed
from mquant_jax.validate import text as checked_text


class LlamaProcessor(ChatFolder):
    """Turns text into a ``Batch``, and tokens into text; see :class:`ChatFolder`."""

    config: LlamaConfig

    def prompt(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Prompt:
        """One user turn in the chat template; the plain text for a model without one.

        Raises:
            UserError: pictures were given; see also :meth:`messages`.
        """
        if self.chat_template is not None:
            return super().prompt(text, images, videos)
        self._refuse(
            listed(images, "images", "pictures", ndim=4), listed(videos, "videos", "clips", ndim=5)
        )
        return self.made(self.backend.encode(checked_text(text, "prompt")).ids)

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation, to be continued by the assistant.

        Args:
            messages: ``{"role": ..., "content": text or text parts}``; other keys are passed to
                the chat template.
            images, videos: none.

        Raises:
            UserError: the model has no chat template; a malformed message; pictures.
        """
        if self.chat_template is None:
            raise UserError(
                f"{self.folder}: no chat template; add a chat_template.jinja to the folder, or use "
                "a plain prompt"
            )
        given = list(messages) if isinstance(messages, Iterable) else messages
        chat, images, videos = self.conversation(given, images, videos)
        self._refuse(images, videos)
        for i, message in enumerate(chat):
            if any(part["type"] != "text" for part in message["content"]):
                raise UserError(f"message {i}: this is a text-only model; "
                                "expected text only")  # fmt: skip
        texts = [{**m, "content": text_of(c)} for m, c in zip(given, chat, strict=True)]
        return self.made(self.rendered_ids(self.render(texts, self.chat_template)))

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts to one length."""
        return batch_of(self.config, prompts, self.pad_id, pad_to)

    def _refuse(self, images: list[Any], videos: list[Any]) -> None:
        if len(images) or len(videos):
            raise UserError(
                f"{self.folder}: this is a text-only model; "
                f"remove the pictures (images: {len(images)}, videos: {len(videos)})"
            )
