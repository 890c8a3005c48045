"""Llama and Qwen2: chat messages in, token ids out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mquant_jax.models.base import Batch, Prompt
from mquant_jax.models.chat import ChatFolder
from mquant_jax.models.llama.config import LlamaConfig
from mquant_jax.models.llama.processing import collate, text_prompt

from mquant_jax.errors import UserError


class LlamaProcessor(ChatFolder):
    """From text to a ``Batch``, and from tokens back to text; see :class:`ChatFolder`."""

    config: LlamaConfig

    def prompt(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Prompt:
        """One user turn in the chat template; the bare text for a model that has none.

        Raises:
            UserError: pictures were given, or as :meth:`messages`.
        """
        if len(images) or len(videos):
            raise UserError(
                f"{self.folder}: this is a language model without a vision part; "
                f"leave the pictures out (images: {len(images)}, videos: {len(videos)})"
            )
        if self.chat_template is None:
            return self._checked(self.tokenizer(text)["input_ids"])
        return self.messages([{"role": "user", "content": text}])

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        """A whole conversation, answered next by the assistant.

        Args:
            messages: ``{"role": ..., "content": text}``.

        Raises:
            UserError: the model has no chat template; a malformed message.
        """
        if self.chat_template is None:
            raise UserError(
                f"{self.folder}: no chat template; give the folder a chat_template.jinja, or use "
                "a plain prompt"
            )
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
                raise UserError(f'message {i}: expected an object with "role" and a text "content"')
        chat = [dict(m) for m in messages]
        return self._checked(self.encode(self.render(chat, self.chat_template)))

    def collate(self, prompts: Sequence[Prompt], *, pad_to: int | None = None) -> Batch:
        """Left-pad prompts to one length."""
        return collate(prompts, self.pad_id, pad_to)

    def _checked(self, ids: Sequence[int]) -> Prompt:
        """The ids as a prompt, if the model knows them all and there are any."""
        vocab = self.config.language.vocab_size
        if not ids:
            raise UserError("the prompt is empty; this model needs one token at least")
        if max(ids) >= vocab:
            raise UserError(
                f"{self.folder / 'tokenizer.json'}: token {max(ids)} is outside the model's "
                f"vocabulary of {vocab}; the tokenizer is of another model"
            )
        return text_prompt(ids)
