"""Damage valid bytes, JSON and files. Every function returns a note on what it did."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

_DEEP = 50_000
# JSON values of the wrong type, out of range, or expensive to read.
VALUES = (
    "null", "true", "false", "0", "-0.0", "-1", "1", "3", "0.5", "1e-320", "1e30", "1e308",
    "1e999", "-1e999", "NaN", "-Infinity", "2147483648", "9223372036854775808", "1" + "0" * 30,
    "1" + "0" * 5000, '""', '"wide"', '"1"', r'"\ud800"', r'"\u0000"', r'"a\nb"',
    r'"\u001b[31m\u2028"', '"' + "x" * 100_000 + '"', "[]", "[[]]", "[1, 2]", "{}",
    '{"a": {"b": []}}', "[null, null, null]", "[" * _DEEP + "]" * _DEEP,
    '{"a":' * _DEEP + "1" + "}" * _DEEP, '"../../outside"', '"/dev/zero"', '"<|im_start|>"',
    "[" + "0," * 20_000 + "0]",
)  # fmt: skip
NAMES = (
    "", ".", "..", "../x", "/dev/zero", "a\0b", "\ud800", "a\nb", "x" * 300, "x" * 100_000,
    "__class__", "\u2028", "params/../..", "C:\\x", "*[?]", " ",
)  # fmt: skip


def damaged_bytes(rng: Random, data: bytes) -> tuple[str, bytes]:
    """Apply one to three changes that know nothing of the format."""
    notes = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        change = rng.choice(_BYTE_CHANGES)
        data = change(rng, data)
        notes.append(change.__name__.strip("_"))
    return "+".join(notes), data


def _flip(rng: Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8) if out else 0):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _truncate(rng: Random, data: bytes) -> bytes:
    return data[: rng.randint(0, len(data))]


def _insert(rng: Random, data: bytes) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 4, 64))) + data[at:]


def _cut(rng: Random, data: bytes) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + data[at + rng.choice((1, 4, 64)) :]


def _overwrite(rng: Random, data: bytes) -> bytes:
    at, count = rng.randint(0, len(data)), rng.choice((1, 4, 8, 64))
    return data[:at] + bytes([rng.choice((0, 255, 10, 34))]) * count + data[at + count :]


def _repeat(rng: Random, data: bytes) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + data[at : at + 64] * rng.choice((2, 100)) + data[at:]


def _swap(rng: Random, data: bytes) -> bytes:
    a, b = sorted(rng.randint(0, len(data)) for _ in range(2))
    return data[b:] + data[a:b] + data[:a]


def _recode(rng: Random, data: bytes) -> bytes:
    return data.decode("latin-1").encode(rng.choice(("utf-16", "utf-8-sig", "utf-8")))


_BYTE_CHANGES = (_flip, _flip, _truncate, _insert, _cut, _overwrite, _repeat, _swap, _recode)


def damaged_json(rng: Random, text: bytes | str, keys: Sequence[str] = ()) -> tuple[str, bytes]:
    """Change types, values and keys of a JSON document.

    Args:
        keys: names known to readers, which may be added to an object.
    """
    data = json.loads(text)
    raw: dict[str, str] = {}
    notes = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, key = _place(rng, data)
        if holder is None:
            break
        change: Callable[..., None] = rng.choice(_JSON_CHANGES)
        change(rng, holder, key, raw)
        notes.append(f"{change.__name__.strip('_')} {str(key)[:40]!r}")
    if keys and isinstance(data, dict) and rng.random() < 0.5:
        key = rng.choice(keys)
        data[key] = _marked(rng.choice(VALUES), raw)
        notes.append(f"add {key!r}")
    out = json.dumps(data)
    for mark, value in raw.items():
        out = out.replace(json.dumps(mark), value)
    shown = ", ".join(v if len(v) < 60 else v[:40] + "..." for v in raw.values())
    return f"{', '.join(notes)} ({shown})", out.encode()


def _place(rng: Random, data: Any) -> tuple[Any, Any]:
    """Return a value's container and key, found by a random walk; ``None`` if there is no value."""
    if not isinstance(data, dict | list) or not data:
        return None, None
    while True:
        key = rng.choice(list(data) if isinstance(data, dict) else range(len(data)))
        value = data[key]
        if not isinstance(value, dict | list) or not value or rng.random() < 0.3:
            return data, key
        data = value


def _marked(value: str, raw: dict[str, str]) -> str:
    """Return a placeholder for raw JSON, to be replaced after serialisation."""
    mark = f"@raw {len(raw)}@"
    raw[mark] = value
    return mark


def _replace(rng: Random, holder: Any, key: Any, raw: dict[str, str]) -> None:
    holder[key] = _marked(rng.choice(VALUES), raw)


def _nudge(rng: Random, holder: Any, key: Any, raw: dict[str, str]) -> None:
    """Replace a value by a similar one."""
    value = holder[key]
    if isinstance(value, bool) or value is None:
        holder[key] = rng.choice((not value, int(bool(value)), str(value)))
    elif isinstance(value, int | float):
        choices = (value + 1, value - 1, -value, 2 * value, value * 10**9, value / 7, str(value))
        holder[key] = rng.choice(choices)
    elif isinstance(value, str):
        extra = rng.choice(NAMES)
        holder[key] = rng.choice((value[1:], value + extra, extra + value, value * 3, extra))
    elif isinstance(value, list):
        holder[key] = rng.choice((value[1:], value[::-1], value * 2, value * 1000))
    else:
        holder[key] = dict(list(value.items())[1:])


def _drop(rng: Random, holder: Any, key: Any, raw: dict[str, str]) -> None:
    del holder[key]


def _double(rng: Random, holder: Any, key: Any, raw: dict[str, str]) -> None:
    """Add the same key again, with another value."""
    if isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[_marked(json.dumps(key), raw)] = _marked(rng.choice(VALUES), raw)


def _rename(rng: Random, holder: Any, key: Any, raw: dict[str, str]) -> None:
    if isinstance(holder, dict):
        holder[rng.choice((*NAMES, key + "x", key.upper()))] = holder.pop(key)
    else:
        _drop(rng, holder, key, raw)


def _wrap(rng: Random, holder: Any, key: Any, raw: dict[str, str]) -> None:
    holder[key] = rng.choice(([holder[key]], {"a": holder[key]}))


def _move(rng: Random, holder: Any, key: Any, raw: dict[str, str]) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key] = copy.deepcopy(holder[other])


_JSON_CHANGES = (_replace, _replace, _replace, _nudge, _nudge, _drop, _double, _rename, _wrap,
                 _move)  # fmt: skip


def special_file(rng: Random, path: Path) -> str:
    """Put something at ``path`` that is not a regular file of this folder."""
    kind = rng.choice(("folder", "fifo", "zero", "loop", "dangling", "outside", "huge", "missing"))
    remove(path)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)  # sparse
    elif kind != "missing":
        target = {"zero": "/dev/zero", "loop": path.name, "dangling": "nothing"}
        path.symlink_to(target.get(kind, "/etc/hostname"))
    return kind


def remove(path: Path) -> None:
    """Remove a file, link or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
