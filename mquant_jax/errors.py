"""Exceptions that command lines report as one readable line with exit status 2."""


class UserError(Exception):
    """Bad usage or input. The message names the file, tensor or option, and what to do.

    The message is one printable line: in quoted names and texts, line breaks become spaces, and
    control characters and characters that cannot be encoded become escapes.
    """

    def __init__(self, message: str = ""):
        super().__init__("".join(map(_printable, message)))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\n\r\t\v\f" else ascii(character)[1:-1]


class ImageError(UserError):
    """A picture cannot be read, or has no unambiguous conversion to RGB."""


class PromptError(UserError, ValueError):
    """A prompt does not fit the model, or its ids, placeholders and pictures do not match."""


class PromptTooLong(PromptError):
    """A prompt has more tokens than the model's context."""


class QueueFull(UserError):
    """The engine's queue is full; try again later."""


class CheckpointError(UserError):
    """A checkpoint folder is missing, damaged, edited or of an unknown format version."""
