"""A process that has imported everything and forks a ``fedveil`` command for every line it is sent.

Every command is a process of its own, with its own sockets, files and randomness, and dies like one; what it saves
is the seconds that importing torch takes in each. Lines are JSON: ``{"start": {"argv", "cwd", "log"}}`` is answered
by ``{"pid"}``, ``{"poll": pid}`` by ``{"code"}`` (null while the process runs, minus the signal if one ended it).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, NoReturn

import fedveil.deploy.cli_server
import fedveil.deploy.server_process
import fedveil.deploy.site_process
from fedveil.common import cli


def child(argv: list[str], cwd: str, log: str) -> NoReturn:
    """Become ``fedveil ARGV``; never returns."""
    code = 70
    try:
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
