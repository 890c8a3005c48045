"""Extract pictures from messages in transformers' chat format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.sample_rows import decoded
from mquant_jax.validate import kind, shown

_PLACES = {"image": ("image", "path", "url", "base64"), "video": ("video",)}
_EXPECTED = {
    "image": 'a picture: {"type": "image", "image": PIL image, path, array, bytes or data: URL}',
    "video": 'frames: {"type": "video", "video": [picture, ...]}',
}


def take_media(messages: Any) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
    """The messages without their pictures, the pictures, and the clips, in order.

    Args:
        messages: ``{"role": ..., "content": text or parts}``. A part is ``{"type": "text", "text":
            ...}``; ``{"type": "image", "image": picture}``, anything that
            :func:`mquant_jax.models.images.load_image` accepts, also under the key ``path``,
            ``url`` (a ``data:`` URL) or ``base64``; OpenAI's ``{"type": "image_url", "image_url":
            {"url": ...}}``; or ``{"type": "video", "video": frames}``.

    Raises:
        UserError: no messages; a malformed part, or one without its picture.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise UserError(f"messages: expected a list of messages, found {kind(messages)}")
    media: dict[str, list[Any]] = {"image": [], "video": []}
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f'message {i}: expected an object with "role" and "content", found '
                            f"{kind(message)}")  # fmt: skip
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str | bytes):
            parts = [_part(p, f"message {i}: part {n}", media) for n, p in enumerate(content)]
            message = {**message, "content": parts}
        plain.append(dict(message))
    return plain, media["image"], media["video"]


def _part(part: Any, where: str, media: Mapping[str, list[Any]]) -> Any:
    """The part without its picture, which is appended to ``media``."""
    if not isinstance(part, Mapping):
        raise UserError(f'{where}: expected an object with "type", found {kind(part)}')
    name: Any = part.get("type")
    if name == "image_url":
        url = part.get("image_url")
        part, name = {"image": url.get("url") if isinstance(url, Mapping) else url}, "image"
    if not isinstance(name, str) or name not in media:
        return dict(part)
    given = [key for key in _PLACES[name] if part.get(key) is not None]
    if len(given) != 1:
        found = f"both {' and '.join(given)}" if given else f"the keys {shown(list(part))}"
        raise UserError(f"{where}: expected {_EXPECTED[name]}; found {found}")
    media[name].append(_picture(part[given[0]], given[0]))
    return {"type": name}


def _picture(value: Any, key: str) -> Any:
    bare = key == "base64" and isinstance(value, str) and value[:5].lower() != "data:"
    return decoded(value, value) if bare else value
