"""Streamed text: whole characters, stop texts, and bounded work per token."""

import pytest

from mquant_jax.runtime.text_stream import TextStream


def decode(ids) -> str:
    """Each token is a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: str, stop=(), decode=decode) -> tuple[list[str], TextStream]:
    stream = TextStream(decode, stop)
    out = []
    for byte in text.encode():
        out.append(stream.push(byte))
        if stream.stopped:
            break
    else:
        out.append(stream.end())
    return out, stream


@pytest.mark.parametrize("text", ["plain", "naïve 你好 🙂", "a\ufffdb", "ends with \ufffd", ""])
def test_whole_characters(text) -> None:
    out, stream = pieces(text)
    assert "".join(out) == stream.text == text
    assert all(len(piece) <= 1 or "\ufffd" in text for piece in out)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    stream = TextStream(decode)
    out = [stream.push(b) for b in "é".encode()[:1]]
    assert out == [""] and stream.end() == stream.text == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("one##", ["###"], "one##"),
        ("abcabd", ["abd"], "abc"),
        ("aab", ["b", "aab"], ""),
        ("你好吗", ["好"], "你"),
        ("stop", ["s"], ""),
    ],
)
def test_stop_texts(text, stop, expected) -> None:
    out, stream = pieces(text, stop)
    assert "".join(out) == stream.text == expected
    assert stream.stopped == any(s in text for s in stop)


def test_long_answers_are_not_decoded_again_and_again() -> None:
    longest = 0

    def counted(ids) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    text = "näive words, " * 100
    out, _ = pieces(text, decode=counted)
    assert "".join(out) == text and longest < 200


def test_decoders_that_look_back() -> None:
    """SentencePiece drops a text's first space, so tokens cannot be decoded in arbitrary parts."""

    def dropping(ids) -> str:
        return decode(ids).removeprefix(" ")

    text = "a  b   c " * 60
    out, _ = pieces(text, decode=dropping)
    assert "".join(out) == text
