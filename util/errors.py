"""UserError, the exception for what a user can correct."""

import unicodedata

_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, bytes that aren't UTF-8, separators of lines


class UserError(Exception):
    """The message says what is wrong, where, and what to do; programs print it without a traceback.

    The message can always be printed, whatever file names it contains.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


def printable(text: object) -> str:
    """A text, such as a file name, as one line that can be shown on a terminal and written to a text file.

    Control characters (also newlines) and bytes that are not UTF-8 become escape sequences.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNPRINTABLE else char
        for char in str(text)
    )
