"""The one exception that commands turn into one line and exit code 2."""


class InputError(Exception):
    """What the user gave cannot be used. The message is one line that names the input and the cure."""
