"""The files beside a model's weights from which a processor is made, typed and bounded.

Nothing here touches the network or runs code from the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mquant_jax.errors import UserError
from mquant_jax.files import is_file, read_json_if_any, read_text
from mquant_jax.schema import shown, token_ids

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Files of which one at least makes a tokenizer; vocab.json needs merges.txt beside it.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken")
_BPE_CLASSES = ("Qwen2Tokenizer", "GPT2Tokenizer")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds any tokenizer."""
    return any(is_file(folder / name) for name in TOKENIZERS)


def image_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """How pictures are prepared, and the file that says so.

    transformers saves preprocessor_config.json, and since version 5 the ``image_processor`` of
    processor_config.json; empty where there is neither.

    Raises:
        UserError: a file that is no JSON object.
    """
    own = folder / PREPROCESSOR
    if settings := read_json_if_any(own):
        return own, settings
    whole = folder / PROCESSOR
    settings = read_json_if_any(whole).get("image_processor")
    if settings is None:
        return own, {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{whole}: image_processor {shown(settings)}: expected an object")
    return whole, dict(settings)


def chat_template(folder: Path) -> tuple[Path, str] | None:
    """The folder's Jinja template and its file; ``None`` when it has none.

    The processor's goes first: a tokenizer's own may know of no pictures.

    Raises:
        UserError: a file that cannot be read, or a template that is no text.
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
    """The default of what may be one template or several with names."""
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
        raise UserError(f"{path}: chat_template {shown(found)}: expected a text, or several with "
                        "names")  # fmt: skip
    return named


def stop_ids(folder: Path, vocab: int) -> tuple[int, ...] | None:
    """Tokens that end an answer, as generation_config.json or config.json says.

    Raises:
        UserError: they are no token ids of the model.
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


def special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the tokens with a role: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``."""
    config = read_json_if_any(folder / TOKENIZER_CONFIG)
    special = read_json_if_any(folder / "special_tokens_map.json") | config
    out = {}
    for key in _NAMED:
        token = special.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            out[key] = token
    return out


def added_tokens(folder: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Ids and descriptions of the tokens that were added to a vocabulary, by id.

    Raises:
        UserError: tokenizer_config.json or added_tokens.json describes them in another form.
    """
    path = folder / TOKENIZER_CONFIG
    found = read_json_if_any(path).get("added_tokens_decoder") or {}
    plain = read_json_if_any(folder / "added_tokens.json")
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: added_tokens_decoder {shown(found)}: expected an object")
    out: dict[int, Mapping[str, Any]] = {}
    for text, i in plain.items():
        if isinstance(i, bool) or not isinstance(i, int):
            raise UserError(f"{folder / 'added_tokens.json'}: {shown(text)} {shown(i)}: expected "
                            "a token id")  # fmt: skip
        out[i] = {"content": text, "special": True}
    for key, token in found.items():
        if not (key.isascii() and key.isdigit() and isinstance(token, Mapping)
                and isinstance(token.get("content"), str)):  # fmt: skip
            raise UserError(f"{path}: added_tokens_decoder.{shown(key)} {shown(token)}: expected a "
                            "token id with an object that has 'content'")  # fmt: skip
        out[int(key)] = token
    return sorted(out.items())


def bpe_tokenizer(folder: Path, kind: Any) -> Any:
    """The tokenizer of a folder with vocab.json and merges.txt alone.

    Args:
        kind: transformers' general class for the tokenizers library.

    Raises:
        UserError: files of another form, or of a tokenizer class that is not known.
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
    try:
        raw = getattr(transformers, name)(vocab=vocab, merges=merges).backend_tokenizer
    except Exception as e:  # the tokenizers library raises bare Exception
        raise UserError(f"{folder / 'vocab.json'}: cannot be loaded: {e}") from e
    names = special_tokens(folder)
    tokenizer = kind(tokenizer_object=raw, **names)
    _add(tokenizer, added_tokens(folder), folder)
    return tokenizer


def _add(tokenizer: Any, tokens: list[tuple[int, Mapping[str, Any]]], folder: Path) -> None:
    """Add tokens behind the vocabulary; their ids must be those that the files say."""
    from tokenizers import AddedToken

    flags = ("lstrip", "rstrip", "normalized", "single_word")
    made = [
        AddedToken(
            token["content"],
            special=bool(token.get("special", True)),
            **{f: bool(token.get(f, False)) for f in flags},
        )
        for _, token in tokens
    ]
    tokenizer.backend_tokenizer.add_tokens(made)
    known = tokenizer.get_vocab()
    for i, token in tokens:
        if known.get(token["content"]) != i:
            raise UserError(f"{folder}: the token {shown(token['content'])} has the id {i} in the "
                            f"tokenizer's files, and would get {known.get(token['content'])}: "
                            "ids must follow those of vocab.json")  # fmt: skip
