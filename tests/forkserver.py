"""Functions of a test module in processes of their own, which start in milliseconds.

    with Server("tests.test_interrupted") as server:
        job = server.start("train_slowly", ["--epochs", "3"])
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL

One process imports torch and the module, and forks for every job before it has threads.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Job:
    """A running or ended function; what it prints goes to the file `log`."""

    server: Server
    pid: int
    log: Path

    def status(self) -> int | None:
        """Exit status, −n after signal n, or None while it runs."""
        return self.server.ask("status", self.pid)

    def wait(self, seconds: float = 120) -> int:
        """The exit status; fails when there is none after so long."""
        end = time.monotonic() + seconds
        while (status := self.status()) is None:
            assert time.monotonic() < end, f"still running; printed:\n{self.printed}"
            time.sleep(0.02)
        return status

    @property
    def printed(self) -> str:
        """Standard output and error so far."""
        return self.log.read_text(encoding="utf-8")


class Server:
    """Starts functions of `module` in forked processes; ends them all when it is left."""

    def __init__(self, module: str, folder: Path) -> None:
        self.module, self.folder, self.pids = module, folder, []

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forkserver", self.module],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in self.pids:
            if self.ask("status", pid) is None:
                os.kill(pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()

    def ask(self, *question: object) -> int | None:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, function: str, *arguments: Sequence[str] | str) -> Job:
        """Call the function with these (strings, lists, numbers) in a new process."""
        log = self.folder / f"{len(self.pids)}-{function}.log"
        pid = self.ask("start", function, arguments, str(log))
        self.pids.append(pid)
        return Job(self, pid, log)


def serve(module: str) -> None:
    """Answer the questions of a `Server`, one to a line, until there are no more."""
    functions = importlib.import_module(module)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        kind, *question = json.loads(line)
        if kind == "start":
            name, arguments, log = question
            Path(log).touch()
            answer = os.fork()
            if not answer:
                run(getattr(functions, name), arguments, log)
        else:
            (pid,) = question
            if pid not in ended:
                with contextlib.suppress(ChildProcessError):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended.get(pid)
        print(json.dumps(answer), flush=True)


def run(function, arguments: Sequence, log: str) -> None:
    """Be that process: as a script does, wait for all threads at the end."""
    for stream, place in ((0, os.devnull), (1, log), (2, log)):
        handle = os.open(place, os.O_RDONLY if not stream else os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, stream)
        os.close(handle)
    # Inherited as ignored where a shell has put the tests into the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 0
    try:
        function(*arguments)
    except SystemExit as stopped:
        status = stopped.code
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)  # taking all of torch down in order would need a second


if __name__ == "__main__":
    serve(sys.argv[1])
