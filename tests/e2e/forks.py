"""A process that has imported everything and forks a ``fedveil`` command for every line it is sent.

Every command is a process of its own, with its own sockets, files and randomness, and dies like one. Forking saves the
seconds that importing torch takes in each. Lines are JSON: ``{"start": {"argv", "cwd", "log"}}`` is answered by
``{"pid"}``, ``{"poll": pid}`` by ``{"code"}`` (null while the process runs, minus the signal if one ended it).

``"start"`` may hold a ``"fault"``: ``{"target": "module:name", "when": "before" or "after", "nth", "kind", "do"}``. The
process does that to itself at the n-th call of the function (that has ``kind`` among its arguments, unless that is
empty). ``do`` is ``kill`` (SIGKILL), ``stop`` (SIGSTOP: it stands still until SIGCONT), ``full`` (from now on there is
room for half a journal row: the disk is full) or ``clock`` (the wall clock jumps a day ahead).
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
import time
from typing import Any, NoReturn

import fedveil.deploy.cli.server
import fedveil.deploy.server_process
import fedveil.deploy.site_process
from fedveil.common import cli, journal


def arm(target: str, when: str, nth: int, kind: str = "", do: str = "kill") -> None:
    """Put a fault into this process."""
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, name), [0]

    def faulty(*args: Any, **kwargs: Any) -> Any:
        due = False
        if not kind or kind in args:
            calls[0] += 1
            due = calls[0] == nth
        if due and when == "before":
            FAULTS[do]()
        out = real(*args, **kwargs)
        if due and when == "after":
            FAULTS[do]()
        return out

    setattr(owner, name, faulty)


def full() -> None:
    """From now on a journal's write reaches the disk in half and fails with ENOSPC, as on a full disk."""

    def write(fd: int, data: bytes) -> None:
        os.write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal.__dict__["_write_all"] = write


def clock() -> None:
    """Wall-clock time jumps a day ahead; the monotonic clock does not."""
    real = time.time
    time.time = lambda: real() + 86_400


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "full": full,
    "clock": clock,
}


def child(argv: list[str], cwd: str, log: str, fault: dict[str, Any] | None = None) -> NoReturn:
    """Become ``fedveil ARGV``; never returns."""
    code = 70
    try:
        if fault:
            arm(**fault)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, out), (2, out)):
            os.dup2(source, target)
        os.chdir(cwd)
        sys.argv = ["fedveil", *argv]
        try:
            cli.main()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException as e:
            sys.excepthook(type(e), e, e.__traceback__)
            code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serve until the other side hangs up; then nothing is left running."""
    children: set[int] = set()
    print(json.dumps({"ready": fedveil.__file__}), flush=True)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if not pid:
                child(**request["start"])
            children.add(pid)
            print(json.dumps({"pid": pid}), flush=True)
        else:
            done, status = os.waitpid(request["poll"], os.WNOHANG)
            children.discard(done)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status) if done else None}), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


main()
