"""The exceptions that command lines turn into one readable line and exit status 2."""


class UserError(Exception):
    """Bad usage or bad input: the message names the file, tensor or option and what to do."""


class ImageError(UserError):
    """A picture that cannot be read or converted to RGB without guessing."""


class PromptError(UserError, ValueError):
    """A prompt that does not fit the model: ids, placeholders and pictures that disagree."""


class PromptTooLong(PromptError):
    """A prompt with more tokens than the model's context holds."""


class CheckpointError(UserError):
    """A checkpoint folder that is missing, damaged, edited or of another format version."""
