"""The command line: a parser that names the nearest flag, flags that commands share, one way to end on a mistake.

    parser = Parser(__doc__)
    parser.add_machine_flags("device", "dtype", "num-workers")
    args = parser.parse_args(argv)          # ValueError for any mistake

    if __name__ == "__main__":
        run(main)                           # prints "error: ..." and exits with code 2

Apache License 2.0.
"""
import argparse
import dataclasses
import inspect
import io
import itertools
import math
import os
import re
import sys
from typing import Annotated, Callable, Literal, NoReturn, get_args, get_origin

import torch
from tqdm import tqdm

from support.machine import known_failure
from support.parallel import Lost, noticing_losses
from support.suggest import nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError instead of exiting, suggests the nearest flag, takes no abbreviations,
    and prints the manual (a module's docstring) as it is."""

    def __init__(self, manual: str, usage: str | None = None):
        super().__init__(description=manual, usage=usage, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_machine_flags(self, *names: str) -> None:
        """Adds --device, --dtype or --num-workers, whichever are named; args.dtype is a key of DTYPES."""
        flags = {
            "device": dict(default="auto", help="auto, cpu, cuda, cuda:1, mps"),
            "dtype": dict(choices=tuple(DTYPES), default="fp32", help="precision of the backbone"),
            "num-workers": dict(type=at_least(-1), default=-1,
                                help="data-loading workers per process; -1: one per CPU core, less one, at most 16")}
        for name in names:
            self.add_argument(f"--{name}", **flags[name])

    def add_fields(self, defaults, any_length: tuple[str, ...] = ()) -> None:
        """Adds a flag for every field of a dataclass, with the values in `defaults`: --like-this for like_this. Types
        may be bool, int, float, str, tuple (of float; as many as the default has, or any number for the fields named in
        `any_length`), a Literal of strings, or Annotated[type, (smallest, largest)]. The comment behind a field is its
        help, and a comment on a line of its own is the heading of the fields below it."""
        comments, groups = comments_of_fields(type(defaults)), {}
        for field in dataclasses.fields(defaults):
            default, kind = getattr(defaults, field.name), plain_type(field)
            if kind is bool:
                options = dict(action=argparse.BooleanOptionalAction)
            elif kind is tuple:
                options = dict(type=float, nargs="+" if field.name in any_length else len(default), metavar="X")
            else:
                options = dict(type=kind, metavar="X")
            choices = f"one of {', '.join(get_args(field.type))}; " if get_origin(field.type) is Literal else ""
            heading, comment = comments[field.name]
            groups[heading] = groups.get(heading) or self.add_argument_group(heading)
            text = f"{choices}{comment} (default {'empty' if default == '' else default})".replace("%", "%%")
            groups[heading].add_argument(flag(field.name), default=default, help=text, **options)

    def error(self, message: str):
        raise ValueError(message)

    def parse_args(self, argv: list[str] | None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        if not {"-h", "--help"}.intersection(argv):
            for word in itertools.takewhile(lambda word: word != "--", argv):
                if re.match(r"--[^ ]+$", name := word.split("=")[0]) and name not in self._option_string_actions:
                    self.unknown(word)  # here, since argparse would first miss the flag that was meant
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.unknown(unknown[0])
        return args

    def unknown(self, word: str) -> NoReturn:
        positional = [action.dest for action in self._actions if not action.option_strings]
        meant = nearest(word.split("=")[0], [*self._option_string_actions, *positional])
        if not word.startswith("-") and "--data" in self._option_string_actions and os.path.exists(word):
            meant = f", did you mean --data {word}?"
        raise ValueError(f"unknown argument {word!r}{meant}; see --help")


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def comments_of_fields(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (heading above it, comment behind it)} of a dataclass, from its source."""
    found, heading = {}, ""
    for line in inspect.getsource(cls).splitlines():
        if above := re.fullmatch(r"    # (\w+)", line):
            heading = above[1]
        elif field := re.fullmatch(r"    (\w+): [^#]*# (.*)", line):
            found[field[1]] = heading, field[2]
    return found


def plain_type(field: dataclasses.Field) -> type:
    """bool, int, float, str or tuple, without the limits of Annotated and the choices of Literal."""
    return str if get_origin(field.type) is Literal else getattr(field.type, "__origin__", field.type)


def check_fields(values) -> None:
    """Raises ValueError if a field of a dataclass lies outside the limits or choices that its type states."""
    for field in dataclasses.fields(values):
        value, kind = getattr(values, field.name), field.type
        if get_origin(kind) is Literal and value not in (choices := get_args(kind)):
            raise ValueError(f"{flag(field.name)} {value!r}{nearest(value, choices)}; one of {', '.join(choices)}")
        if get_origin(kind) is Annotated:
            least, most = kind.__metadata__[0]
            if not all(least <= v <= most and math.isfinite(v) for v in (value if type(value) is tuple else [value])):
                fits = f"lie between {least:g} and {most:g}" if most < math.inf else f"be {least:g} or more"
                raise ValueError(f"{flag(field.name)} must {fits}, got {value}")


def at_least(low: int) -> Callable[[str], int]:
    """An argument type: integers >= low."""
    def integer(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, not {text}")
        return int(text)
    return integer


def positive(text: str) -> float:
    """An argument type: numbers above zero."""
    if not float(text) > 0:  # also refuses NaN
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return float(text)


HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # controls, bidi, not UTF-8


def printable(text: str) -> str:
    """Makes a text with foreign names in it, such as those of files, safe to print in one line: control characters and
    bytes that are not UTF-8 become escapes such as \\n, \\x1b and \\xff."""
    return HIDDEN.sub(lambda c: f"\\x{ord(c[0]) & 0xFF:02x}" if "\udc80" <= c[0] <= "\udcff" else
                      c[0].encode("unicode_escape").decode(), text)


def note(text: str) -> None:
    """Prints a note on stderr, without disturbing a progress bar."""
    tqdm.write(f"note: {printable(text)}", file=sys.stderr)


def run_subcommand(commands: dict[str, Callable], manual: str, argv: list[str] | None):
    """Calls commands[NAME](remaining arguments), or prints the manual. Raises ValueError for an unknown name."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        return print(manual)
    if name not in commands:
        raise ValueError(f"unknown command {name!r}{nearest(name, commands)}; commands: {', '.join(commands)}")
    return commands[name](rest)


def run(main: Callable[[], object], interrupted: str = "", less_memory: str = "") -> None:
    """Runs a command. A user's mistake ends with one line on stderr and exit code 2. A failure of the machine (another
    process is lost, or memory runs out, where `less_memory` says what to lower) ends with one line and code 1, Ctrl-C
    with code 130, after the line `interrupted` if there is one."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has something else
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 shows escapes
    try:
        with noticing_losses():
            main()
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        failure = known_failure(error, less_memory)
        if not failure and not isinstance(error, (ValueError, OSError, Lost)):
            raise
        print(f"error: {failure or last_line(error)}", file=sys.stderr)
        sys.exit(1 if failure or isinstance(error, Lost) else 2)


def last_line(error: BaseException) -> str:
    """An error's message as one line. Errors from a data-loading worker carry the worker's whole traceback: of these
    the last line, without the name of the class. (images.short_reason() is for damaged images, parallel.root_cause()
    for failed writes.)"""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:
        text = re.sub(r"^[\w.]+: ", "", text.split("\n")[-1])
    return printable(text)
