"""What a user can get wrong, and how every script says so.

A script's entry point is wrapped in `script_errors`: an `InputError`, a file that the system
refuses, or too little memory ends it with one line `error: …` on stderr and exit status 2; anything
else is a bug and keeps its traceback.
"""

import contextlib
import difflib
import errno
import functools
import signal
import sys
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


class InputError(ValueError):
    """Something the person who typed the command can put right; the message says what and how."""


def warn(message: str) -> None:
    """Tell the person who typed the command; in a script one line `warning: …`, each once."""
    warnings.warn(message, stacklevel=2)


def suggest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the nearest of `known`, or "" where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_known(what: str, name: object, known: Collection[str]) -> None:
    """Raise InputError unless `name` is one of `known`; what: it names, for the message."""
    if name not in known:
        hint = suggest(str(name), known)
        raise InputError(f"unknown {what} {name!r}{hint}: one of {', '.join(known)}")


def _say(kind: str, message: object) -> None:
    print(f"{kind}:", *str(message).split("\n"), file=sys.stderr)  # one line


# What the system may refuse at any place where a file is looked at; another OSError is a bug.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}
_REFUSED |= {errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE}


def _what_to_mend(error: Exception) -> str | None:
    """What to say of an exception that the user can do something about; None of a bug."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    too_little = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if too_little or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        said = str(error).split("\n")[0] or "no more to be had"
        less = "a smaller --batch_size or --image_size, or fewer images, need less"
        return f"out of memory: {said}; {less}"
    return None


class Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds like Ctrl-C, so that temporary files and locks go."""


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the tidying up
    raise Terminated


@contextlib.contextmanager
def script_errors() -> Iterator[None]:
    """Turn an `InputError` into `error: …` and exit 2, Ctrl-C into exit 130, SIGTERM into 143.

    Warnings are printed as one line `warning: …`, without the place in the code, each once.
    """
    told = functools.cache(lambda message: _say("warning", message))
    main_thread = threading.current_thread() is threading.main_thread()
    ours = main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: told(str(message))
            yield
    except Exception as error:
        if (said := _what_to_mend(error)) is None:
            raise
        _say("error", said)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        print("terminated" if terminated else "interrupted", file=sys.stderr)
        number = signal.SIGTERM if terminated else signal.SIGINT
        raise SystemExit(128 + number) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def thread_pool(*args: object) -> Iterator[ThreadPoolExecutor]:
    """A ThreadPoolExecutor(*args) that drops waiting work when an exception leaves it.

    `map` does so by itself, but not when a signal interrupts it while it hands the work out.
    """
    pool = ThreadPoolExecutor(*args)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
