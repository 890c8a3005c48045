"""Tokens to text as they come: whole characters only, and up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNKNOWN = "\ufffd"  # how decoders show the bytes of a character that is not complete
_WINDOW = 64  # tokens that are decoded again with each new one, at least


class TextStream:
    """The text of an answer that grows token by token.

    Attributes:
        ids: the tokens so far.
        text: what has been given out.
        stopped: a stop text has come; ``text`` ends before it.

    Args:
        decode: tokens -> text.
        stop: texts that end the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self.decode, self.stop = decode, tuple(stop)
        self.ids: list[int] = []
        self.text, self.stopped = "", False
        self._settled, self._from = "", 0  # text of the first tokens, and how many those are

    def push(self, token: int) -> str:
        """One more token; the text that it completes."""
        self.ids.append(token)
        whole = self._decoded()
        return self._give(whole, whole.rstrip(_UNKNOWN))

    def end(self) -> str:
        """No more tokens: the text that was held back."""
        whole = self._decoded()
        return self._give(whole, whole, last=True)

    def _decoded(self) -> str:
        """All tokens as text. Those long past are not decoded again, where that changes nothing."""
        recent = self.decode(self.ids[self._from :])
        split = len(self.ids) - _WINDOW
        if split - self._from >= _WINDOW:
            front, back = self.decode(self.ids[self._from : split]), self.decode(self.ids[split:])
            if front + back == recent:
                self._settled, self._from = self._settled + front, split
                recent = back
        return self._settled + recent

    def _give(self, whole: str, certain: str, last: bool = False) -> str:
        """Give out ``certain`` up to a stop text, or to what may become one."""
        if self.stopped:
            return ""
        # What may begin a stop text is not given out, so none begins before the end of ``text``.
        ends = [at for s in self.stop if (at := whole.find(s, len(self.text))) >= 0]
        if ends:
            self.stopped, upto = True, min(ends)
        else:
            upto = len(certain) if last else len(certain) - self._maybe_stop(certain)
        new = whole[len(self.text) : upto]
        self.text += new
        return new

    def _maybe_stop(self, text: str) -> int:
        """Characters at the end of a text that a stop text may begin with."""
        most = max((len(s) - 1 for s in self.stop), default=0)
        for n in range(min(most, len(text)), 0, -1):
            if any(s.startswith(text[-n:]) for s in self.stop):
                return n
        return 0
