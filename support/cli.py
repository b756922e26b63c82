"""The command line: a parser that names the nearest flag, flags that commands share, one way to end on a mistake.

    parser = Parser(__doc__)
    parser.add_machine_flags("device", "dtype", "num-workers")
    args = parser.parse_args(argv)          # ValueError for any mistake

    if __name__ == "__main__":
        run(main)                           # prints "error: ..." and exits with code 2

Apache License 2.0.
"""
import argparse
import difflib
import re
import sys
from typing import Callable

import torch

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

    def error(self, message: str):
        raise ValueError(message)

    def parse_args(self, argv: list[str] | None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [s for action in self._actions for s in action.option_strings]
            raise ValueError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], flags)}; see --help")
        return args


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


def nearest(name: str, names) -> str:
    """", did you mean X?" with the closest of `names`, in upper or lower case; "" if none is close."""
    spelled = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    return f", did you mean {spelled[close[0]]}?" if close else ""


def run_subcommand(commands: dict[str, Callable], manual: str, argv: list[str] | None):
    """Calls commands[NAME](remaining arguments), or prints the manual. Raises ValueError for an unknown name."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        return print(manual)
    if name not in commands:
        raise ValueError(f"unknown command {name!r}{nearest(name, commands)}; commands: {', '.join(commands)}")
    return commands[name](rest)


def run(main: Callable[[], object], interrupted: str = "") -> None:
    """Runs a command. A mistake of the user ends with one line on stderr and exit code 2; Ctrl-C with code 130, after
    the line `interrupted` if there is one."""
    try:
        main()
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {last_line(error)}", file=sys.stderr)
        sys.exit(2)


def last_line(error: BaseException) -> str:
    """The last line of an error's message, without the name of its class: errors from a data-loading worker carry the
    worker's whole traceback. (images.short_reason() is for damaged images, parallel.root_cause() for failed writes.)"""
    text = str(error).strip() or type(error).__name__
    last = text.splitlines()[-1]
    return re.sub(r"^[\w.]+: ", "", last) if "Traceback (most recent call last)" in text else last
