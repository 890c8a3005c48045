"""Streaming detokenization: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNKNOWN = "\ufffd"  # decoders return it for the bytes of an incomplete character
_WINDOW = 64  # with each new token at least so many earlier ones are decoded again


class TextStream:
    """The text of an answer that grows token by token.

    Attributes:
        ids: the tokens so far.
        text: the text returned so far.
        stopped: whether a stop text was found; ``text`` ends before it.

    Args:
        decode: turns tokens into text.
        stop: texts that end the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self.decode, self.stop = decode, tuple(stop)
        self.ids: list[int] = []
        self.text, self.stopped = "", False
        self._settled, self._from = "", 0  # text of the first tokens, and their number

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes."""
        self.ids.append(token)
        whole = self._decoded()
        return self._give(whole, whole.rstrip(_UNKNOWN))

    def end(self) -> str:
        """End the stream; returns the text held back so far."""
        whole = self._decoded()
        return self._give(whole, whole, last=True)

    def _decoded(self) -> str:
        """The text of all tokens. Old tokens are not decoded again where that changes nothing."""
        recent = self.decode(self.ids[self._from :])
        split = len(self.ids) - _WINDOW
        if split - self._from >= _WINDOW:
            front, back = self.decode(self.ids[self._from : split]), self.decode(self.ids[split:])
            if front + back == recent:
                self._settled, self._from = self._settled + front, split
                recent = back
        return self._settled + recent

    def _give(self, whole: str, certain: str, last: bool = False) -> str:
        """Return the new text of ``certain``, up to a stop text or its possible beginning."""
        if self.stopped:
            return ""
        # Possible beginnings are held back, so no stop text begins within ``text``.
        ends = [at for s in self.stop if (at := whole.find(s, len(self.text))) >= 0]
        if ends:
            self.stopped, upto = True, min(ends)
        else:
            upto = len(certain) if last else len(certain) - self._maybe_stop(certain)
        new = whole[len(self.text) : upto]
        self.text += new
        return new

    def _maybe_stop(self, text: str) -> int:
        """Length of the end of ``text`` that may be the beginning of a stop text."""
        most = max((len(s) - 1 for s in self.stop), default=0)
        for n in range(min(most, len(text)), 0, -1):
            if any(s.startswith(text[-n:]) for s in self.stop):
                return n
        return 0
