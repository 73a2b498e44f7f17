"""The one exception that commands turn into one line and exit code 2."""


class InputError(Exception):
    """What the user gave cannot be used. The message is one line that names the input and the cure."""

    def __init__(self, message: str):
        # it may quote what a library said, in several lines
        super().__init__(" ".join(str(message).split()))
