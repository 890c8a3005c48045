"""The exceptions that command lines turn into one readable line and exit status 2."""


class UserError(Exception):
    """Bad usage or bad input: the message names the file, tensor or option and what to do.

    The message is one printable line whatever names and texts it quotes: line breaks become
    spaces, and other characters that a terminal would act on or cannot encode become escapes.
    """

    def __init__(self, message: str = ""):
        super().__init__("".join(map(_printable, message)))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\n\r\t\v\f" else ascii(character)[1:-1]


class ImageError(UserError):
    """A picture that cannot be read or converted to RGB without guessing."""


class PromptError(UserError, ValueError):
    """A prompt that does not fit the model: ids, placeholders and pictures that disagree."""


class PromptTooLong(PromptError):
    """A prompt with more tokens than the model's context holds."""


class QueueFull(UserError):
    """An engine that has as many requests waiting as it may hold; try again later."""


class CheckpointError(UserError):
    """A checkpoint folder that is missing, damaged, edited or of another format version."""
