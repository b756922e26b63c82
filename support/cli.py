"""The command line. Apache License 2.0."""
import argparse
import difflib
import sys
from typing import Callable


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and leave; names the nearest flag; no abbreviations."""

    def __init__(self, manual: str, usage: str | None = None):
        super().__init__(description=manual, usage=usage, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise ValueError(message)

    def parse_args(self, argv: list[str] | None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [s for action in self._actions for s in action.option_strings]
            raise ValueError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], flags)}; see --help")
        return args


def nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def run_subcommand(commands: dict[str, Callable], manual: str, argv: list[str] | None):
    """Calls commands[NAME](rest of the arguments); prints the manual for --help. Raises ValueError for other names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        return print(manual)
    if name not in commands:
        raise ValueError(f"unknown command {name!r}{nearest(name, commands)}; commands: {', '.join(commands)}")
    return commands[name](rest)


def run(main: Callable[[], object], interrupted: str = "") -> None:
    """Runs a command. What the user can mend ends in one line on stderr and exit code 2; Ctrl-C, with the line
    `interrupted` if there is one, in exit code 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(print(interrupted, file=sys.stderr, end="\n" * bool(interrupted)) or 130)
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {last_line(error)}", file=sys.stderr) or 2)


def last_line(error: BaseException) -> str:
    """What an error says; of one that a data-loading worker has sent with its whole stack, the last line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return text.removeprefix("ValueError: ").removeprefix("data.Unreadable: ")
