"""The exceptions that command lines turn into a readable line and exit status 2."""


class UserError(Exception):
    """Bad usage or bad input: the message names the file, tensor or option and what to do."""


class CheckpointError(UserError):
    """A converted checkpoint that is missing, damaged, edited or of another format."""
