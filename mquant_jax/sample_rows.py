"""Parse a line of a JSONL file of samples into pictures, question and answer."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import decimal
import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mquant_jax.errors import UserError
from mquant_jax.files import is_file
from mquant_jax.validate import shortened, text

_KEYS = ("image", "images", "question", "answer", "task", "conversations", "messages")
_FORMS = ("question", "conversations", "messages")
_MARK = re.compile(r"\n?<image>\n?")
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
             "system": "system"}  # fmt: skip
_ROLES = ("system", "user", "assistant", "tool")
# First characters of pictures in base64: PNG, JPEG, GIF, WebP, BMP, TIFF.
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
_BASE64_LEAST = 32  # characters; no picture is smaller, and shorter strings are paths
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A parsed line; for attributes see :class:`mquant_jax.samples.Sample`."""

    images: tuple[Any, ...]
    question: str
    answer: str
    task: str
    messages: tuple[Message, ...] = ()


class RowReader:
    """Reads lines of one file.

    Attributes:
        ignored: unknown keys found so far, in order.
    """

    def __init__(self, path: Path):
        self.path, self.ignored = path, list[str]()
        self._rows: np.ndarray | None = None  # of the .npz, loaded on first use

    def row(self, line: str) -> Row:
        """
        Raises:
            UserError: the line is not a sample, or names a missing picture.
        """
        data = json_object(line)
        present = [key for key in _FORMS if key in data]
        if len(present) != 1:
            found = f"found {', '.join(present)}" if present else f"found {_keys(data)}"
            raise UserError('expected an object with one of "question", "conversations" and '
                            f'"messages" (and "image", "answer"), {found}')  # fmt: skip
        self.ignored += [key for key in data if key not in (*_KEYS, *self.ignored)]
        images = self._images(data)
        answer, task = _label(data, "answer"), _label(data, "task")
        if "question" in data:
            return Row(images, text(data["question"], "question"), answer, task)
        kind = present[0]
        turns = _conversation(data[kind]) if kind == "conversations" else _messages(data[kind])
        return self._turns(turns, images, answer, task)

    def _turns(self, turns: list[Message], images: tuple[Any, ...], answer: str, task: str) -> Row:
        """A conversation; one question that follows its pictures becomes a plain question."""
        said = turns.pop() if turns and turns[-1]["role"] == "assistant" else None
        if said is not None and answer:
            raise UserError('both "answer" and a last turn of the assistant; give one of them')
        answer = _spoken(said["content"]) if said else answer
        if not turns or turns[-1]["role"] != "user":
            raise UserError("the conversation has no question from the user before its answer")
        images = self._placed(turns, images)
        question = _spoken(turns[-1]["content"])
        kinds = [part["type"] for part in turns[-1]["content"]]
        plain = len(turns) == 1 and kinds == sorted(kinds)  # pictures, then text
        return Row(images, question, answer, task, () if plain else tuple(turns))

    def _placed(self, turns: list[Message], images: tuple[Any, ...]) -> tuple[Any, ...]:
        """All pictures in the order of their parts; removes the pictures from the parts.

        Pictures without a placeholder come before the first question.
        """
        places = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
        if not places and images:
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"][:0] = [{"type": "image"} for _ in images]
            return images
        inside = [part.pop("image") for part in places if "image" in part]
        if inside and images:
            raise UserError('pictures both in the messages and in "image" or "images"; use one')
        found = tuple(map(self.picture, inside)) if inside else images
        if len(found) != len(places):
            raise UserError(f"{len(places)} placeholders (<image>), but {len(found)} "
                            "pictures")  # fmt: skip
        return found

    def _images(self, data: dict[str, Any]) -> tuple[Any, ...]:
        given = [key for key in ("image", "images") if data.get(key) is not None]
        if len(given) > 1:
            raise UserError('both "image" and "images"; give one of them')
        refs = data[given[0]] if given else []
        return tuple(map(self.picture, refs if isinstance(refs, list) else [refs]))

    def picture(self, ref: Any) -> Any:
        """Resolve a picture: a path, base64, or the index of a row.

        Raises:
            UserError: none of these, or the picture does not exist.
        """
        if isinstance(ref, int) and not isinstance(ref, bool):
            return self._array(ref)
        if not isinstance(ref, str):
            raise UserError(f"image {shortened(repr(ref), 60)} is neither a path, base64, nor a "
                            "row of the .npz next to the file")  # fmt: skip
        if ref[:5].lower() == "data:":
            return decoded(ref.partition(",")[2], ref)
        if _URL.match(ref):
            raise UserError(f"{shortened(ref)}: URLs are not downloaded; download the picture and "
                            "give its path")  # fmt: skip
        try:
            # File names are UTF-8 like the text, whatever the locale's encoding.
            path = self.path.parent / os.fsdecode(ref.encode("utf-8"))
            if path.is_file():
                return path
        except (OSError, ValueError):  # too long or with a NUL: not a path, but perhaps base64
            pass
        if len(ref) >= _BASE64_LEAST and ref.startswith(_BASE64):
            return decoded(ref, ref)
        raise UserError(f"no such picture: {shortened(self.path.parent / ref)}")

    def _array(self, number: int) -> np.ndarray:
        if self._rows is None:
            self._rows = _npz(self.path.with_suffix(".npz"))
        if not 0 <= number < len(self._rows):
            raise UserError(f"image {number} is neither a path nor a row of the .npz next to the "
                            f"file, which has {len(self._rows)}")  # fmt: skip
        return self._rows[number]


def _npz(path: Path) -> np.ndarray:
    """The array ``images`` of an .npz file; empty if the file does not exist.

    Raises:
        UserError: the file is not as expected.
    """
    if not is_file(path):
        return np.zeros((0, 1, 1, 3), np.uint8)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
    except Exception as e:  # zipfile, zlib and NumPy raise many types
        why = "no array with this name" if isinstance(e, KeyError) else e
        raise UserError(f"{path}: cannot read the array images: {why}") from e
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(f"{path}: images is {images.dtype} {list(images.shape)}; expected uint8 "
                        "[N, H, W, 3]")  # fmt: skip
    return images


def json_object(line: str) -> dict[str, Any]:
    """
    Raises:
        UserError: the line is not a JSON object.
    """
    try:
        data = json.loads(line, parse_float=decimal.Decimal, parse_constant=_no_number)
    except RecursionError as e:
        raise UserError("not valid JSON: nested too deeply") from e
    except (ValueError, decimal.DecimalException) as e:
        raise UserError(f"not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise UserError('expected an object with "question" (and "image", "answer")')
    return data


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _keys(data: dict[str, Any]) -> str:
    return shortened(", ".join(data)) or "no keys"


def _label(data: dict[str, Any], key: str) -> str:
    """Text, or a number in digits; "" for null."""
    value = data.get(key)
    if value is None:
        return ""
    if isinstance(value, int | decimal.Decimal) and not isinstance(value, bool):
        return str(value)
    return text(value, key)


def decoded(body: str, ref: str) -> bytes:
    """Decode a picture in base64.

    Args:
        ref: the original string, for messages.

    Raises:
        UserError: ``body`` is empty or not base64.
    """
    try:
        picture = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise UserError(f"image {shortened(ref, 40)}: not base64: {e}") from e
    if not picture:
        raise UserError(f"image {shortened(ref, 40)}: no bytes")
    return picture


def _conversation(turns: Any) -> list[Message]:
    """LLaVA's ``{"from": "human" or "gpt", "value": text}`` as messages with parts."""
    return [_turn(turn, i, "conversations", "from", "value") for i, turn in _each(turns)]


def _messages(turns: Any) -> list[Message]:
    return [_turn(turn, i, "messages", "role", "content") for i, turn in _each(turns)]


def _each(turns: Any) -> list[tuple[int, Any]]:
    if not isinstance(turns, list) or not turns:
        raise UserError("a conversation must be a list of at least one turn")
    return list(enumerate(turns))


def _turn(turn: Any, number: int, key: str, who: str, what: str) -> Message:
    where = f"{key}[{number}]"
    if not isinstance(turn, dict) or not {who, what} <= turn.keys():
        raise UserError(f'{where}: expected an object with "{who}" and "{what}"')
    role = turn[who]
    if who == "from":
        role = _SPEAKERS.get(role) if isinstance(role, str) else None
    if role not in _ROLES:
        raise UserError(f"{where}: {who} is {shortened(repr(turn[who]), 40)}; expected one of "
                        f"{', '.join(_SPEAKERS if who == 'from' else _ROLES)}")  # fmt: skip
    content = turn[what]
    if isinstance(content, list) and what == "content":
        return {"role": role, "content": [_part(part, where) for part in content]}
    return {"role": role, "content": _parts(text(content, where), role)}


def _parts(said: str, role: str) -> list[Message]:
    """Split a text into parts. In the user's text, ``<image>`` and line breaks around it become a
    picture."""
    if role != "user":
        return [{"type": "text", "text": said}]
    parts: list[Message] = []
    for i, piece in enumerate(_MARK.split(said)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts or [{"type": "text", "text": ""}]


def _part(part: Any, where: str) -> Message:
    """A part of a message, with its picture, if it has one, under ``image``."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": text(part.get("text"), where)}
    if kind == "image":
        return {"type": "image"} | ({"image": part["image"]} if part.get("image") else {})
    if kind == "image_url":
        url = part.get("image_url")
        return {"type": "image", "image": url.get("url") if isinstance(url, dict) else url}
    raise UserError(f"{where}: a part must be text, image or image_url, found "
                    f"{shortened(repr(part), 60)}")  # fmt: skip


def _spoken(parts: list[Message]) -> str:
    return "".join(part["text"] for part in parts if part["type"] == "text")
