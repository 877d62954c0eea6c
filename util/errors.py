"""The one exception for what a user can put right."""

import unicodedata

_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that aren't UTF-8, separators of lines


class UserError(Exception):
    """Its message says what was wrong, where, and what to do; programs print it without a traceback.

    Whatever names of files are in it, it can be printed.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


def printable(text: object) -> str:
    """A text, such as the name of a file, as one line that a terminal and any file of text can take.

    Control characters, newlines among them, and bytes that are not UTF-8 are shown as escape sequences.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNPRINTABLE else char
        for char in str(text)
    )
