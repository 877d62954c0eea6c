"""The parser of every program, and the roles of options."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path


class Role(Enum):
    """What an option decides. Resuming, the record of a run, the leaderboard and export go by it."""

    WHAT = "what is trained, on what, and how it is judged: another value makes another run"
    FROM = "which weights the training starts from: has no effect on a run that is resumed"
    HOW = "how it is computed, how fast, and what is shown meanwhile"
    WHERE = "where the data is, and what is kept of the run"
    START = "how this start is made: its name, its comment, what it continues"


WHAT, FROM, HOW, WHERE, START = Role


def option(group: argparse._ActionsContainer, role: Role, *names: str, **settings) -> None:
    """Declare an option with its role; `names` and `settings` are those of argparse's `add_argument`."""
    group.add_argument(*names, **settings).role = role


class Parser(argparse.ArgumentParser):
    """A parser that answers what it can't use with one line, and a mistyped option with the nearest one there is.

    Its name, `prog`, is that of the program's file, or of the installed command that started it.
    """

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **({"formatter_class": _Help, "allow_abbrev": False} | settings))
        if (command := Path(sys.argv[0]).name).startswith("dereflect"):
            self.prog = command

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        args = list(sys.argv[1:] if args is None else args)
        known = self._known()
        for name in (text.partition("=")[0] for text in args[: args.index("--") if "--" in args else None]):
            if name.startswith("--") and name not in known:
                self.error(f"there is no option {name}{nearest(name, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        message = re.sub(r"invalid choice: (.*) \(choose from (.*)\)$", r"\1 is not one of \2", message)
        message = re.sub(r"invalid \S+ value: (.*)$", r"\1 can't be used", message)
        self.exit(2, f"error: {' '.join(message.removeprefix('argument ').split())}\n")

    def _known(self) -> set[str]:
        """The names of its options, those of its subcommands included."""
        names = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names.update(*(parser._known() for parser in action.choices.values()))
        return names


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is something to show that the help doesn't say itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def nearest(name: str, known: Iterable[str]) -> str:
    """The option that was probably meant, as the end of a message."""

    def plain(text: str) -> str:
        return re.sub("[-_]", "", text.lower())

    by_plain = {plain(option): option for option in sorted(known) if not re.match("-[^-]", option)}
    found = difflib.get_close_matches(plain(name), by_plain, 1)
    return f"; did you mean {by_plain[found[0]]}?" if found else "; --help lists those there are"
