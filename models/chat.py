"""What processors share: the tokenizer and chat template of a model's folder.

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
    """Chats to text and tokens, tokens to text, as the files of a folder say.

    Families bring ``messages(messages, images, videos) -> Prompt``.

    Args:
        folder: holds tokenizer.json, (SentencePiece) tokenizer.model, or vocab.json and merges.txt;
            and as published tokenizer_config.json, generation_config.json and the chat template.
        config: the model's config.

    Raises:
        UserError: a needed file is missing; at first use: it is unreadable.
    """

    NEEDED: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    # What will do in the place of a needed file.
    INSTEAD: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokenizer.json": ("tokenizer.model", "vocab.json"),
    }
    ROLES: ClassVar[tuple[str, ...]] = ("system", "user", "assistant", "tool")
    # What stands in prompts for a visual token, where no id of the vocabulary does.
    PLACEHOLDER: ClassVar[int | None] = None
    # Texts that place pictures in a prompt, beside the tokenizer's special tokens.
    MARKS: ClassVar[tuple[str, ...]] = ()
    # Whether :meth:`encode` turns what a text spells into special tokens.
    SPELLED: ClassVar[bool] = True

    def __init__(self, folder: str | Path, config: Any):
        self.folder, self.config = Path(folder), config
        for name in self.NEEDED:
            names = (name, *self.INSTEAD.get(name, ()))
            if not any(is_file(self.folder / n) for n in names):
                raise UserError(f"{self.folder / name}: no such file (the processor needs it)")

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer.

        The general class takes tokenizer.json as it is; those that AutoTokenizer chooses rebuild
        parts of it, such as how digits are split, by the name in tokenizer_config.json.
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
            # The length is the model's matter: the tokenizer's own would only be warned about.
            return kind.from_pretrained(
                self.folder, local_files_only=True, model_max_length=_ANY_LENGTH
            )

    def _sentencepiece(self, kind: Any):
        """The tokenizer of a folder with tokenizer.model alone."""
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
        """The folder's chat template; ``None`` when it has none.

        Raises:
            UserError: it is none that could be rendered.
        """
        found = chat_files.chat_template(self.folder)
        if found is None:
            return None
        path, source = found
        try:
            return ChatTemplate(source)
        except Exception as e:  # jinja2 and Python's compiler raise many kinds
            raise UserError(f"{path}: the chat template cannot be used: {one_line(e)}") from e

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: generation_config.json, config.json, then the tokenizer.

        Raises:
            UserError: a file names what is no token id of the model.
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
        """The ``tokenizers.Tokenizer``, which threads may share.

        transformers' class around it sets its options in every call, which other threads may then
        see, or which fails while they use it.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not self.SPELLED
        return backend

    @functools.cached_property
    def literal(self) -> LiteralText:
        """What keeps the special tokens that users type from being some."""
        return LiteralText(self.backend, self.MARKS, self.shown_tokens)

    @property
    def shown_tokens(self) -> list[str]:
        """Added tokens that :meth:`decode` shows, which belong into an earlier answer's text."""
        added = self.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if not token.special]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, no special tokens added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def rendered_ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a chat's text, in which :meth:`chat` may have hidden what users spelled."""
        if is_hidden(text):
            return self.literal.encode(text, add_special_tokens)
        if add_special_tokens:
            return self.backend.encode(text).ids
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens removed."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def prompt(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Prompt:
        """One user turn.

        Args:
            text: pictures stand in front of it, or where :meth:`turn` says.
            images: what :func:`mquant_jax.models.images.load_image` takes.
            videos: sequences of frames, each like an image.

        Raises:
            UserError: as :meth:`messages`.
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
        """A whole conversation, answered next by the assistant."""
        raise NotImplementedError

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """A whole conversation whose parts hold their pictures, answered next by the assistant.

        Texts are nothing but text: special tokens and placeholders that they spell have the ids of
        their letters. Without such, the prompt is that of :meth:`messages`.

        Args:
            messages: as :func:`mquant_jax.models.chat_media.take_media` has them.

        Raises:
            UserError: as ``take_media`` and :meth:`messages`.
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
        """What :meth:`messages` was given, checked: messages with parts, pictures, clips.

        Args:
            placed: see :func:`normalised`.

        Raises:
            UserError: no messages, or malformed ones; pictures that are no sequence.
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
        if (given := len(images) + len(videos)) > most:  # each takes one token at least
            raise PromptTooLong(f"{given} pictures and clips in one prompt, while the model's "
                                f"context is {most} tokens; give fewer")  # fmt: skip
        return chat, images, videos

    def made(
        self,
        ids: Sequence[int],
        grids: Sequence[tuple[int, int, int]] = (),
        patches: np.ndarray | None = None,
        seconds: Sequence[float] = (),
    ) -> Prompt:
        """A prompt of these ids and patches.

        Raises:
            UserError: no ids, or one that the model does not know.
        """
        if not ids:
            raise PromptError("the prompt is empty; this model needs one token at least")
        vocab = self.config.language.vocab_size
        check_ids(ids, vocab, self.PLACEHOLDER, f"{self.folder}: tokenizer")
        patches = np.zeros((0, 0), np.float32) if patches is None else patches
        return Prompt(list(ids), list(grids), patches, tuple(seconds))

    def continued(self, prompt: Prompt, text: str) -> Prompt:
        """The prompt followed by the beginning of its answer.

        Raises:
            UserError: as :meth:`made`.
        """
        ids = [*prompt.input_ids, *self.encode(checked_text(text, "answer"))]
        return self.made(ids, prompt.grids, prompt.patches, prompt.seconds)

    @property
    def unknown_tokens(self) -> list[str]:
        """Tokens of the tokenizer whose ids are outside the model's vocabulary, by id."""
        vocab = self.config.language.vocab_size
        known = self.tokenizer.get_vocab()
        return sorted((t for t, i in known.items() if i >= vocab), key=known.__getitem__)

    def vocabulary_warning(self) -> str | None:
        """What a conversion says of a tokenizer that is larger than the embedding."""
        unknown, vocab = self.unknown_tokens, self.config.language.vocab_size
        if not unknown:
            return None
        shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        return (
            f"{self.folder}: the tokenizer has {len(unknown)} ids outside the model's vocabulary "
            f"of {vocab} ({shown}); prompts with them will be refused"
        )

    def render(self, chat: list[dict[str, Any]], template: ChatTemplate) -> str:
        """The text of a chat that the assistant is to go on with.

        Raises:
            UserError: the template fails, takes too long, or makes too much.
        """
        tokens = self.tokenizer.special_tokens_map
        try:
            text = template.render(chat, **tokens, add_generation_prompt=True)
            text.encode()  # fails for half of a surrogate pair
            return text
        except Exception as e:  # whatever the template raises
            raise UserError(f"{self.folder}: the chat template fails: {one_line(e)}") from e


def one_line(e: BaseException) -> str:
    """An error of somebody else's code as one short line."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 3] + "..."


def import_transformers():
    """The library, imported late (it takes a second) and kept from advising to install torch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def normalised(
    message: Any,
    index: int,
    placed: re.Pattern[str] | None = None,
    roles: Sequence[str] = ChatFolder.ROLES,
) -> dict[str, Any]:
    """The message with its content as parts, placeholders in texts turned into parts.

    Args:
        index: its number, for error messages.
        placed: finds placeholders; its first group is the kind of part, ``image`` or ``video``.
            ``None``: texts stay whole.
        roles: those that the model knows.

    Raises:
        UserError: it is no message, or of an unknown role.
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
    """A text as parts: what stands between placeholders, and the placeholders."""
    at = 0
    for match in placed.finditer(text):
        if match.start() > at:
            yield {"type": "text", "text": text[at : match.start()]}
        yield {"type": match[1]}
        at = match.end()
    if at < len(text):
        yield {"type": "text", "text": text[at:]}


def text_of(message: dict[str, Any]) -> str:
    """The text parts of a message together."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def check_count(who: str, kind: str, places: int, pictures: Sequence[Any]) -> None:
    """
    Raises:
        UserError: there are not as many pictures as places for them.
    """
    if places != len(pictures):
        raise UserError(f"{who} {kind} placeholders, but {len(pictures)} {kind}s were given")
