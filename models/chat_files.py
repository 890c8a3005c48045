"""Read the files of a model folder that define its processor, with checked types and sizes.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.files import MOST_BYTES, check_regular, is_file, read_json_if_any, read_text
from mquant_jax.schema import Schema, flag, real, token_ids, whole
from mquant_jax.validate import shortened, shown

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Any of these files defines a tokenizer; vocab.json also needs merges.txt.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken")
_BPE_CLASSES = ("Qwen2Tokenizer", "GPT2Tokenizer")
_ID = whole(low=0, high=2**24)
_UNNAMED = {"unk_token": None, "bos_token": None, "eos_token": None, "pad_token": None}
_LEAST = 1e-6  # lower bound of temperature and top_p; smaller values keep one token
_SAMPLING = Schema(
    {
        "do_sample": flag(False),
        "temperature": real(1.0, 0.0, 1e6, null=True),
        "top_k": whole(50, null=True),
        "top_p": real(1.0, 0.0, 1.0, null=True),
        "repetition_penalty": real(1.0, _LEAST, 1e6, null=True),
    }
)
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """Wrap calls of tokenizers and transformers that parse a file.

    Raises:
        UserError: instead of any exception that they raise, including plain ``Exception``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        what = shortened(e, 300) or type(e).__name__
        raise UserError(f"{path}: cannot be loaded: {what}") from e


def check_readable(folder: Path) -> None:
    """Check the files that transformers reads itself.

    Raises:
        UserError: a file is a pipe or device, which might never end; not a JSON object; or not a
            valid template.
    """
    for name in ("tokenizer.json", "chat_template.jinja"):
        if os.path.lexists(folder / name):
            check_regular(folder / name, MOST_BYTES)
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"):
        read_json_if_any(folder / name)
    chat_template(folder)


def settings_of(folder: Path, own: str, key: str) -> tuple[Path, dict[str, Any]]:
    """Preprocessing settings of pictures or videos, and their file; empty if there are none.

    Args:
        own: the file that holds only these settings.
        key: their key in processor_config.json, the file in which transformers 5 saves everything.

    Raises:
        UserError: a file is not a JSON object.
    """
    path = folder / own
    if settings := read_json_if_any(path):
        return path, settings
    whole = folder / PROCESSOR
    part = read_json_if_any(whole).get(key)
    if part is None:
        return path, {}
    if not isinstance(part, Mapping):
        raise UserError(f"{whole}: {key} {shown(part)}: expected an object")
    return whole, dict(part)


def image_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """:func:`settings_of` pictures."""
    return settings_of(folder, PREPROCESSOR, "image_processor")


def chat_template(folder: Path) -> tuple[Path, str] | None:
    """The folder's Jinja template and its file; ``None`` if it has none.

    The processor's template takes precedence, because the tokenizer's may not support pictures.

    Raises:
        UserError: a file cannot be read, or a template is not a text.
    """
    for name in (PROCESSOR, "chat_template.json"):
        found = read_json_if_any(folder / name).get("chat_template")
        if found is not None:
            return folder / name, _one_template(found, folder / name)
    path = folder / "chat_template.jinja"
    if is_file(path):
        return path, read_text(path)
    path = folder / TOKENIZER_CONFIG
    found = read_json_if_any(path).get("chat_template")
    return None if found is None else (path, _one_template(found, path))


def _one_template(found: Any, path: Path) -> str:
    """The default template of one or several named ones."""
    named: Any = found
    if isinstance(found, list):
        pairs = [(t.get("name"), t.get("template")) for t in found if isinstance(t, Mapping)]
        named = {k: v for k, v in pairs if isinstance(k, str)} if len(pairs) == len(found) else 0
    if isinstance(named, Mapping) and named:
        known = ", ".join(map(shown, named))
        named = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
        if named is None:
            raise UserError(f"{path}: chat_template has the names {known}; "
                            "expected one of them to be 'default'")  # fmt: skip
    if not isinstance(named, str):
        raise UserError(f"{path}: chat_template {shown(found)}: expected a text, or several named "
                        "ones")  # fmt: skip
    return named


def stop_ids(folder: Path, vocab: int) -> tuple[int, ...] | None:
    """Tokens that end an answer, from generation_config.json or config.json.

    Raises:
        UserError: they are not token ids of the model.
    """
    field = token_ids(None, vocab - 1)
    for name in ("generation_config.json", "config.json"):
        data = read_json_if_any(folder / name)
        for key in ("", "text_config", "llm_config"):
            part = data.get(key) if key else data
            value = part.get("eos_token_id") if isinstance(part, Mapping) else None
            if value is not None:
                return field.read(value, f"{folder / name}: eos_token_id")
    return None


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Sampling options of generation_config.json: ``temperature`` (0 is greedy), ``top_k`` (0
    keeps all), ``top_p`` and ``repetition_penalty``. Missing ones have transformers' defaults.

    Raises:
        UserError: a value of the wrong type or out of range.
    """
    path = folder / "generation_config.json"
    found = _SAMPLING.read(read_json_if_any(path), str(path))
    if not found.pop("do_sample") or found["temperature"] < _LEAST:
        return found | {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    return found | {"top_p": max(found["top_p"], _LEAST)}


def special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the tokens with a role, such as ``bos_token``."""
    config = read_json_if_any(folder / TOKENIZER_CONFIG)
    special = read_json_if_any(folder / "special_tokens_map.json") | config
    out = {}
    for key in _NAMED:
        token = special.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            out[key] = token
    return out


def added_tokens(folder: Path) -> dict[int, Mapping[str, Any]]:
    """Id -> description of the tokens added to a vocabulary, sorted by id.

    Raises:
        UserError: tokenizer_config.json or added_tokens.json is malformed.
    """
    path = folder / TOKENIZER_CONFIG
    found = read_json_if_any(path).get("added_tokens_decoder") or {}
    plain = read_json_if_any(folder / "added_tokens.json")
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: added_tokens_decoder {shown(found)}: expected an object")
    out: dict[int, Mapping[str, Any]] = {}
    for text, i in plain.items():
        i = _ID.read(i, f"{folder / 'added_tokens.json'}: {shown(text)}")
        out[i] = {"content": text, "special": True}
    for key, token in found.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and isinstance(token, Mapping)
                and isinstance(token.get("content"), str)):  # fmt: skip
            raise UserError(f"{path}: added_tokens_decoder.{shown(key)} {shown(token)}: expected a "
                            "token id with an object that has 'content'")  # fmt: skip
        out[_ID.read(int(key), f"{path}: added_tokens_decoder")] = token
    return dict(sorted(out.items()))


def bpe_tokenizer(folder: Path, kind: Any) -> Any:
    """The tokenizer of a folder that only has vocab.json and merges.txt.

    Args:
        kind: transformers' generic wrapper of the tokenizers library.

    Raises:
        UserError: malformed files, or an unknown tokenizer class.
    """
    import transformers

    path = folder / TOKENIZER_CONFIG
    found = read_json_if_any(path).get("tokenizer_class") or _BPE_CLASSES[0]
    name = str(found).removesuffix("Fast")
    if name not in _BPE_CLASSES:
        raise UserError(f"{path}: tokenizer_class {shown(found)}: vocab.json and merges.txt are "
                        f"read for {', '.join(_BPE_CLASSES)}; save tokenizer.json")  # fmt: skip
    vocab = read_json_if_any(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    with loading(folder / "vocab.json"):
        raw = getattr(transformers, name)(vocab=vocab, merges=merges, **_UNNAMED)
        raw = raw.backend_tokenizer
    with loading(path):
        _add(raw, added_tokens(folder), folder)
        return kind(tokenizer_object=raw, **special_tokens(folder))


def _add(tokenizer: Any, tokens: Mapping[int, Mapping[str, Any]], folder: Path) -> None:
    """Add tokens after the vocabulary of a ``tokenizers.Tokenizer``.

    Raises:
        UserError: their ids would differ from those in the files.
    """
    from tokenizers import AddedToken

    flags = ("lstrip", "rstrip", "normalized", "single_word")
    made = [
        AddedToken(
            token["content"],
            special=bool(token.get("special", True)),
            **{f: bool(token.get(f, False)) for f in flags},
        )
        for token in tokens.values()
    ]
    tokenizer.add_tokens(made)
    known = tokenizer.get_vocab()
    for i, token in tokens.items():
        if known.get(token["content"]) != i:
            raise UserError(f"{folder}: the token {shown(token['content'])} has the id {i} in the "
                            f"tokenizer's files, and would get {known.get(token['content'])}: "
                            "ids must follow those of vocab.json")  # fmt: skip
