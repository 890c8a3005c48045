"""Shared by processors: the tokenizer and chat template of a model folder.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mquant_jax.errors import PromptError, PromptTooLong, UserError
from mquant_jax.files import is_file, read_json_if_any
from mquant_jax.models import chat_files
from mquant_jax.models.base import Prompt
from mquant_jax.models.chat_media import take_media
from mquant_jax.models.literal import LiteralText, is_hidden
from mquant_jax.models.prompts import check_ids
from mquant_jax.models.template import ChatTemplate
from mquant_jax.validate import listed
from mquant_jax.validate import text as checked_text

_LONGEST_ERROR, _ANY_LENGTH = 300, 10**9
KINDS = ("image", "video")
Message = Mapping[str, Any]


class ChatFolder:
    """Turns chats into text and tokens, and tokens into text, by the files of a folder.

    Families implement ``messages(messages, images, videos) -> Prompt``.

    Args:
        folder: has tokenizer.json, (SentencePiece) tokenizer.model, or vocab.json and merges.txt,
            and optionally tokenizer_config.json, generation_config.json and a chat template.
        config: the model's config.

    Raises:
        UserError: a required file is missing; on first use: it is unreadable.
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    # Alternatives for required files.
    INSTEAD: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokenizer.json": ("tokenizer.model", "vocab.json"),
    }
    ROLES: ClassVar[tuple[str, ...]] = ("system", "user", "assistant", "tool")
    # Placeholder of a visual token in prompts, if it is not an id of the vocabulary.
    PLACEHOLDER: ClassVar[int | None] = None
    # Texts that place pictures in a prompt, in addition to the tokenizer's special tokens.
    MARKS: ClassVar[tuple[str, ...]] = ()
    # Whether :meth:`encode` parses special tokens in a text.
    SPELLED: ClassVar[bool] = True

    def __init__(self, folder: str | Path, config: Any):
        self.folder, self.config = Path(folder), config
        for name in self.NEEDED:
            names = (name, *self.INSTEAD.get(name, ()))
            if not any(is_file(self.folder / n) for n in names):
                raise UserError(f"{self.folder / name}: no such file (required by the processor)")

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer.

        The generic class uses tokenizer.json unchanged. The classes that AutoTokenizer selects by
        the name in tokenizer_config.json rebuild parts of it, such as the splitting of digits.
        """
        kind = import_transformers().PreTrainedTokenizerFast
        path = self.folder / "tokenizer.json"
        if not is_file(path):
            sentencepiece = is_file(self.folder / "tokenizer.model")
            return (
                self._sentencepiece(kind)
                if sentencepiece
                else chat_files.bpe_tokenizer(self.folder, kind)
            )
        chat_files.check_readable(self.folder)
        with chat_files.loading(path):
            # The model limits the length; the tokenizer's own limit would only cause warnings.
            return kind.from_pretrained(
                self.folder, local_files_only=True, model_max_length=_ANY_LENGTH
            )

    def _sentencepiece(self, kind: Any):
        """The tokenizer of a folder that only has tokenizer.model."""
        from mquant_jax.models.sentencepiece import build_tokenizer, read_pieces

        config = read_json_if_any(self.folder / chat_files.TOKENIZER_CONFIG)
        names = chat_files.special_tokens(self.folder)
        path = self.folder / "tokenizer.model"
        pieces = read_pieces(path)
        bos = names.get("bos_token", "<s>") if config.get("add_bos_token", True) else None
        added = chat_files.added_tokens(self.folder)
        with chat_files.loading(path):
            return kind(tokenizer_object=build_tokenizer(pieces, added, bos), **names)

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The folder's chat template; ``None`` if it has none.

        Raises:
            UserError: it is not a valid template.
        """
        found = chat_files.chat_template(self.folder)
        if found is None:
            return None
        path, source = found
        try:
            return ChatTemplate(source)
        except Exception as e:  # jinja2 and Python's compiler raise many types
            raise UserError(f"{path}: the chat template cannot be used: {one_line(e)}") from e

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: generation_config.json, config.json, then the tokenizer.

        Raises:
            UserError: a file has a value that is not a token id of the model.
        """
        found = chat_files.stop_ids(self.folder, self.config.language.vocab_size)
        if found is not None:
            return found
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (eos,)

    @functools.cached_property
    def sampling_defaults(self) -> dict[str, Any]:
        """See :func:`mquant_jax.models.chat_files.sampling_defaults`."""
        return chat_files.sampling_defaults(self.folder)

    @property
    def pad_id(self) -> int:
        """The tokenizer's padding token (any id does: padding is masked)."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    @functools.cached_property
    def backend(self):
        """The ``tokenizers.Tokenizer``, which is thread-safe.

        transformers' wrapper sets its options in every call, which affects other threads, or fails
        while they use it.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not self.SPELLED
        return backend

    @functools.cached_property
    def literal(self) -> LiteralText:
        """Keeps special tokens in users' texts literal."""
        return LiteralText(self.backend, self.MARKS, self.shown_tokens)

    @property
    def shown_tokens(self) -> list[str]:
        """Added tokens that :meth:`decode` keeps, so that earlier answers may contain them."""
        added = self.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if not token.special]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def rendered_ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered chat, in which :meth:`chat` may have hidden literal text."""
        if is_hidden(text):
            return self.literal.encode(text, add_special_tokens)
        if add_special_tokens:
            return self.backend.encode(text).ids
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def prompt(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Prompt:
        """One user turn.

        Args:
            text: follows the pictures, unless :meth:`turn` places them.
            images: anything that :func:`mquant_jax.models.images.load_image` accepts.
            videos: sequences of frames, each like an image.

        Raises:
            UserError: see :meth:`messages`.
        """
        text = checked_text(text, "prompt")
        images = listed(images, "images", "pictures", ndim=4)
        videos = listed(videos, "videos", "clips", ndim=5)
        content = self.turn(text, images, videos)
        return self.messages([{"role": "user", "content": content}], images, videos)

    def turn(self, text: str, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
        """The parts of one user message: pictures, then the text."""
        pictures = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
        return [*pictures, {"type": "text", "text": text}]

    def messages(
        self, messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> Prompt:
        """A conversation, to be continued by the assistant."""
        raise NotImplementedError

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """A conversation whose parts contain their pictures, to be continued by the assistant.

        Texts are literal: special tokens and placeholders in them are tokenized as plain
        characters. Without any, the prompt equals that of :meth:`messages`.

        Args:
            messages: see :func:`mquant_jax.models.chat_media.take_media`.

        Raises:
            UserError: see ``take_media`` and :meth:`messages`.
        """
        plain, images, videos = take_media(messages)
        hidden = [self.literal.hide_message(message) for message in plain]
        return self.messages(hidden, images, videos)

    def conversation(
        self,
        messages: Any,
        images: Any = (),
        videos: Any = (),
        placed: re.Pattern[str] | None = None,
    ) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
        """The checked arguments of :meth:`messages`: messages with parts, pictures, clips.

        Args:
            placed: see :func:`normalised`.

        Raises:
            UserError: no messages, or malformed ones; pictures that are not a sequence.
        """
        found = type(messages).__name__
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
            raise UserError(f"messages: expected a list of messages, found {found}")
        chat = [normalised(message, i, placed, self.ROLES) for i, message in enumerate(messages)]
        if not chat:
            raise UserError("messages: the list is empty; a conversation must end with a message "
                            "of role 'user'")  # fmt: skip
        images = listed(images, "images", "pictures", ndim=4)
        videos = listed(videos, "videos", "clips", ndim=5)
        most = self.config.language.max_positions
        if (given := len(images) + len(videos)) > most:  # each takes at least one token
            raise PromptTooLong(f"{given} pictures and clips in one prompt, but the model's "
                                f"context is {most} tokens; pass fewer")  # fmt: skip
        return chat, images, videos

    def made(
        self,
        ids: Sequence[int],
        grids: Sequence[tuple[int, int, int]] = (),
        patches: np.ndarray | None = None,
        seconds: Sequence[float] = (),
    ) -> Prompt:
        """A prompt with these ids and patches.

        Raises:
            UserError: no ids, or one outside the model's vocabulary.
        """
        if not ids:
            raise PromptError("the prompt is empty; expected at least one token")
        vocab = self.config.language.vocab_size
        check_ids(ids, vocab, self.PLACEHOLDER, f"{self.folder}: tokenizer")
        patches = np.zeros((0, 0), np.float32) if patches is None else patches
        return Prompt(list(ids), list(grids), patches, tuple(seconds))

    def continued(self, prompt: Prompt, text: str) -> Prompt:
        """The prompt followed by the beginning of an answer.

        Raises:
            UserError: see :meth:`made`.
        """
        ids = [*prompt.input_ids, *self.encode(checked_text(text, "answer"))]
        return self.made(ids, prompt.grids, prompt.patches, prompt.seconds)

    @property
    def unknown_tokens(self) -> list[str]:
        """Tokens whose ids are outside the model's vocabulary, sorted by id."""
        vocab = self.config.language.vocab_size
        known = self.tokenizer.get_vocab()
        return sorted((t for t, i in known.items() if i >= vocab), key=known.__getitem__)

    def vocabulary_warning(self) -> str | None:
        """A warning if the tokenizer is larger than the embedding."""
        unknown, vocab = self.unknown_tokens, self.config.language.vocab_size
        if not unknown:
            return None
        shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        return (
            f"{self.folder}: the tokenizer has {len(unknown)} ids outside the model's vocabulary "
            f"of {vocab} ({shown}); prompts with them will be refused"
        )

    def render(self, chat: list[dict[str, Any]], template: ChatTemplate) -> str:
        """The text of a chat, for the assistant to continue.

        Raises:
            UserError: the template fails, takes too long, or produces too much.
        """
        tokens = self.tokenizer.special_tokens_map
        try:
            text = template.render(chat, **tokens, add_generation_prompt=True)
            text.encode()  # fails for a lone surrogate
            return text
        except Exception as e:  # anything a template may raise
            raise UserError(f"{self.folder}: the chat template fails: {one_line(e)}") from e


def one_line(e: BaseException) -> str:
    """A third-party error as one short line."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 3] + "..."


def import_transformers():
    """Import transformers on demand (it takes a second), without its advice to install torch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def normalised(
    message: Any,
    index: int,
    placed: re.Pattern[str] | None = None,
    roles: Sequence[str] = ChatFolder.ROLES,
) -> dict[str, Any]:
    """The message with its content as parts; placeholders in texts become parts.

    Args:
        index: the message's index, for error messages.
        placed: matches placeholders; its first group is the kind of part, ``image`` or ``video``.
            ``None``: texts stay whole.
        roles: roles that the model supports.

    Raises:
        UserError: not a message, or an unknown role.
    """
    where = f"message {index}"
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise UserError(f'{where}: expected an object with "role" and "content"')
    role, content = message["role"], message["content"]
    if role not in roles:
        raise UserError(f"{where}: role {role!r} is not one of {', '.join(roles)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        found = type(content).__name__
        raise UserError(f"{where}: content must be text or a list of parts, found {found}")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in KINDS:
            parts.append({"type": kind})
        elif kind == "text" and "text" in part:
            text = checked_text(part["text"], where)
            parts.extend(_split(text, placed) if placed else [{"type": "text", "text": text}])
        else:
            raise UserError(f"{where}: a part must be text, image or video, found {part!r}")
    return {"role": role, "content": parts}


def _split(text: str, placed: re.Pattern[str]) -> Iterator[dict[str, Any]]:
    """Split a text into placeholders and the texts between them."""
    at = 0
    for match in placed.finditer(text):
        if match.start() > at:
            yield {"type": "text", "text": text[at : match.start()]}
        yield {"type": match[1]}
        at = match.end()
    if at < len(text):
        yield {"type": "text", "text": text[at:]}


def text_of(message: dict[str, Any]) -> str:
    """The concatenated text parts of a message."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def check_count(who: str, kind: str, places: int, pictures: Sequence[Any]) -> None:
    """
    Raises:
        UserError: the number of pictures differs from the number of placeholders.
    """
    if places != len(pictures):
        raise UserError(f"{who} {kind} placeholders, but {len(pictures)} {kind}s were given")
