"""The one kind of error that is the user's to mend: a config, a file, a picture, weights, memory; and how it is worded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SHOWN = 3


class UserError(Exception):
    """A mistake that the user can mend; the message names the field or file and says what to do.

    The command line prints it as one message and exits with code 2.
    """


@contextmanager
def named(where: str) -> Iterator[None]:
    """Put the field or file that a mistake is in before its message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def counted(number: int, noun: str) -> str:
    """``1 picture`` or ``3 pictures``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def first_line(error: BaseException) -> str:
    """What a library's error says, without what follows below."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
