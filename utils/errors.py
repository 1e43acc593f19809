"""What a user can get wrong, and how every script says so.

A script's entry point is wrapped in `script_errors`: an `InputError` ends it with one line
`error: …` on stderr and exit status 2, anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """Something the person who typed the command can put right; the message says what and how."""


def suggest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the nearest of `known`, or "" where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def script_errors() -> Iterator[None]:
    """Turn an `InputError` into `error: …` and exit 2, an interrupt into exit 130.

    Warnings are printed as one line `warning: …`, without the place in the code.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
