"""Keep special tokens in users' texts literal.

A chat template writes special tokens as text, so the same text in a message would become a special
token. Before a chat is rendered, :meth:`LiteralText.hide_message` replaces the first character of
every such spelling in a message by a stand-in. Special tokens in the rendered text then come from
the template only. :meth:`LiteralText.encode` restores the characters and encodes the text with a
copy of the tokenizer whose special tokens have secret spellings. The copy is otherwise identical,
so a text without special tokens gets the same ids either way.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer

# Two characters that Unicode reserves for internal use, around a secret number.
_OPEN = f"\ufdd0{secrets.randbelow(10**12)}"
_CLOSE = "\ufdd1"
_STAND_IN = re.compile(f"{_OPEN}x([0-9a-f]+){_CLOSE}", re.IGNORECASE)


class Spellings:
    """Texts that a template or tokenizer would interpret, so they must be hidden."""

    def __init__(self, spellings: Iterable[str]):
        self.all = sorted({s for s in spellings if s.strip()}, key=len, reverse=True)
        self._beginnings = {s[:i] for s in self.all for i in range(1, len(s))}
        self._ends = {s[i:] for s in self.all for i in range(1, len(s))}
        self._longest = max(map(len, self.all), default=0)

    def hide(self, text: str) -> str:
        """The text with a stand-in where a spelling begins, or could be completed by the
        surrounding text."""
        starts = set(self._starts(text))
        edge = range(max(0, len(text) - self._longest), len(text))
        starts.update(i for i in edge if text[i:] in self._beginnings)
        if any(text[:n] in self._ends for n in range(1, min(len(text), self._longest) + 1)):
            starts.add(0)
        pieces, at = [], 0
        for i in sorted(starts):
            pieces += [text[at:i], f"{_OPEN}x{ord(text[i]):x}{_CLOSE}"]
            at = i + 1
        return "".join([*pieces, text[at:]])

    def inside(self, text: str) -> bool:
        """Whether the text contains any of the spellings."""
        return any(s in text for s in self.all)

    def _starts(self, text: str) -> Iterable[int]:
        for spelling in self.all:
            at = text.find(spelling)
            while at >= 0:
                yield at
                at = text.find(spelling, at + 1)


class LiteralText:
    """Encodes chats in which users' texts cannot produce special tokens.

    Tokens of white space only are exempt, because they represent text.

    Args:
        tokenizer: its added tokens, special or not, cannot result from users' text.
        marks: other texts with a meaning in prompts, such as a family's picture placeholder.
        shown: added tokens that answers may contain, so they are allowed in assistants' texts.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Iterable[str], shown: Iterable[str]):
        self._original = tokenizer
        self._added = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
        self._added = [content for content in self._added if content.strip()]
        of_user = {*self._added, *marks}
        self._user, self._assistant = Spellings(of_user), Spellings(of_user - {*shown})

    def hide_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with special spellings in its texts hidden until :meth:`encode`."""
        spellings = self._assistant if message.get("role") == "assistant" else self._user
        return {k: v if k == "role" else self._hide(v, spellings) for k, v in message.items()}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered text: visible spellings are special, hidden ones are not."""
        text = self._spelled.sub(lambda m: self._secret[m[0]], text)
        return self._tokenizer.encode(shown(text), add_special_tokens=add_special_tokens).ids

    def _hide(self, value: Any, spellings: Spellings) -> Any:
        """JSON-like data with the spellings in all its texts hidden."""
        if isinstance(value, str):
            return self._hide_text(value, spellings)
        if isinstance(value, Mapping):
            return {k: v if k == "type" else self._hide(v, spellings) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(v, spellings) for v in value]
        return value

    def _hide_text(self, text: str, spellings: Spellings) -> str:
        hidden, normalizer = spellings.hide(text), self._original.normalizer
        if hidden == text and normalizer and spellings.inside(normalizer.normalize_str(text)):
            # A single stand-in selects the tokenizer without the public spellings.
            i = len(text) - len(text.lstrip())
            hidden = f"{text[:i]}{_OPEN}x{ord(text[i]):x}{_CLOSE}{text[i + 1 :]}"
        return hidden

    @functools.cached_property
    def _secret(self) -> dict[str, str]:
        return {content: f"{_OPEN}t{i}{_CLOSE}" for i, content in enumerate(self._added)}

    @functools.cached_property
    def _spelled(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=len, reverse=True)
        first = "".join(re.escape(c) for c in sorted({s[0] for s in longest_first}))
        return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})")

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer with secret spellings of its added tokens and the same ids."""
        data = json.loads(self._original.to_str())
        data["truncation"] = data["padding"] = None
        for token in data["added_tokens"]:
            if token["content"] in self._secret:
                token["content"] = self._secret[token["content"]]
        data["model"] |= self._renamed(data["model"])
        return Tokenizer.from_str(json.dumps(data))

    def _renamed(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The changes to the description of a tokenizer's model, of any kind."""
        secret, vocab = self._secret, model["vocab"]
        if isinstance(vocab, list):  # Unigram: pieces with scores
            return {"vocab": [[secret.get(piece, piece), score] for piece, score in vocab]}
        out: dict[str, Any] = {"vocab": {secret.get(k, k): i for k, i in vocab.items()}}
        if model.get("unk_token") in secret:
            out["unk_token"] = secret[model["unk_token"]]
        if "merges" in model:
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            out["merges"] = [m for m in pairs if not {*m, "".join(m)} & secret.keys()]
        return out


def is_hidden(text: str) -> bool:
    """Whether a text contains a stand-in."""
    return _OPEN in text


def shown(text: str) -> str:
    """The text with its stand-ins replaced by the original characters."""
    return _STAND_IN.sub(lambda m: chr(int(m[1], 16)), text)
