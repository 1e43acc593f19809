"""Functions of a test module in processes of their own, which start in milliseconds.

    with Server("tests.test_interrupted", folder) as server:
        job = server.start("train", ["--epochs", "3"])
        job.kill()
        assert job.wait() == -signal.SIGKILL

multiprocessing's fork server imports torch and the scripts once, and forks for every job.
"""

from __future__ import annotations

import importlib
import multiprocessing.forkserver
import os
import signal
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "train_corruption", "model_patching", "make_corruptions"])


class Job:
    """A running or ended function of `module`; what it prints goes to the file `log`."""

    def __init__(self, module: str, function: str, arguments: tuple, log: Path) -> None:
        log.touch()
        self.log = log
        self.process = CONTEXT.Process(target=_call, args=(module, function, arguments, log))
        self.process.start()
        self.pid = self.process.pid

    def status(self) -> int | None:
        """Exit status, −n after signal n, or None while it runs."""
        return self.process.exitcode

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.process.kill()

    def wait(self, seconds: float = 120) -> int:
        """The exit status; fails when there is none after so long."""
        self.process.join(seconds)
        assert self.status() is not None, f"still running; printed:\n{self.printed}"
        return self.status()

    def wait_for(self, marker: Path) -> None:
        """Return when the job has made the file `marker`; fails when it ends without."""
        while not marker.exists():
            assert self.status() is None, self.printed
            time.sleep(0.01)

    @property
    def printed(self) -> str:
        """Standard output and error so far."""
        return self.log.read_text(encoding="utf-8")


class Server:
    """Starts functions of `module`, with their logs in `folder`; ends them all when it is left."""

    def __init__(self, module: str, folder: Path) -> None:
        self.module, self.folder, self.jobs = module, folder, []

    def __enter__(self) -> Server:
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
            multiprocessing.forkserver.ensure_running()
        return self

    def __exit__(self, *exception: object) -> None:
        for job in self.jobs:
            job.kill()

    def start(self, function: str, *arguments: object) -> Job:
        """Call the function with these arguments (to be pickled) in a new process."""
        log = self.folder / f"{len(self.jobs)}-{function}.log"
        self.jobs.append(Job(self.module, function, arguments, log))
        return self.jobs[-1]


def _call(module: str, function: str, arguments: tuple, log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    # Inherited as ignored where a shell has put the tests into the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    getattr(importlib.import_module(module), function)(*arguments)
