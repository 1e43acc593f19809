"""What a user can get wrong, and how every script says so.

A script's entry point is wrapped in `script_errors`: an `InputError`, or a file that the system
refuses, ends it with one line `error: …` on stderr and exit status 2; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """Something the person who typed the command can put right; the message says what and how."""


def suggest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the nearest of `known`, or "" where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _one_line(message: Warning | str | Exception) -> str:
    return " ".join(str(message).split("\n"))


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {_one_line(message)}", file=sys.stderr)


# What the system may refuse at any place where a file is looked at; another OSError is a bug.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}
_REFUSED |= {errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE}


class Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files and locks go."""


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the tidying up
    raise Terminated


@contextlib.contextmanager
def script_errors() -> Iterator[None]:
    """Turn an `InputError` into `error: …` and exit 2, Ctrl-C into exit 130, SIGTERM into 143.

    Warnings are printed as one line `warning: …`, without the place in the code.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except InputError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {_one_line(place)}{error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except Terminated:
        print("terminated", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
