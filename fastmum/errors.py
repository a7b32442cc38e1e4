"""The base of errors that a user can fix, and how commands report them."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


class FastmumError(RuntimeError):
    """An error that a user can fix. The message is one line that names the file or key and the remedy."""


class StoppedError(FastmumError):
    """A wait for data that a stop signal ended."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]


def some_names(names: Sequence[str], most: int = 10) -> str:
    """The first names, separated by commas, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def some_reasons(reasons: Mapping[str, str], most: int = 10) -> str:
    """The same with the reason of each name in brackets."""
    return some_names([f"{name} ({why})" for name, why in reasons.items()], most)


@contextlib.contextmanager
def writing(file: Path, kind: type[FastmumError], *others: type[Exception]) -> Iterator[None]:
    """Turn an OSError of writing a file, or one of `others`, into a `kind` that names the file."""
    errors: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or error
        raise kind(f"'{file}' cannot be written ({reason})") from error


def program(module: str) -> str:
    """The running command for its `--help`: `fastmum train`, or `python -m fastmum.train`."""
    return sys.argv[0] if sys.argv[0].startswith("fastmum ") else f"python -m {module}"


def run_command(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run the body of a command, turn errors for the user into one line on stderr, and return the exit code.

    It is that of `command` (None: 0), 2 after a `FastmumError`, or 130 after Ctrl-C, which prints `interrupted`. Names
    of files that are not UTF-8 are printed with escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return command() or 0
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except FastmumError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
