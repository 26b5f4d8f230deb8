"""Flower's own processes on loopback, and ours beside them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

from fedveil.deploy.lab import demo_hospitals
from fedveil.deploy.superlink import commands

BIN = Path(sys.executable).parent
PATIENCE = 600.0
# A bundle such as anybody could submit: its import writes a file, its ServerApp sends every node a message.
_PROJECT = b"""\
[project]
name = "stranger"
version = "1.0.0"
description = "writes a file when it is imported"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "nobody"

[tool.flwr.app.components]
serverapp = "stranger.app:server"
clientapp = "stranger.app:client"
"""
_APP = b"""\
import json, os, time
from pathlib import Path

with open(os.environ["CANARY"], "a") as f:
    f.write("imported\\n")

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()


@client.query()
def query(message, context):
    return Message(RecordDict({"answer": ConfigRecord({"code": "ran"})}), reply_to=message)


@server.main()
def main(grid, context):
    end = time.monotonic() + PATIENCE
    while len(nodes := list(grid.get_node_ids())) < 2 and time.monotonic() < end:
        time.sleep(0.5)
    messages = [Message(RecordDict({"q": ConfigRecord({"n": 1})}), n, "query") for n in nodes]
    out = {}
    for reply in grid.send_and_receive(messages, timeout=PATIENCE):
        said = reply.error.reason if reply.has_error() else reply.content["answer"]["code"]
        out[str(reply.metadata.src_node_id)] = said
    path = Path(os.environ["CANARY"] + ".replies")
    (path.parent / (path.name + ".part")).write_text(json.dumps(out))
    (path.parent / (path.name + ".part")).rename(path)
"""


class Processes:
    """Everything started here writes to ``home/NAME.log`` and is ended here.

    Every process finds in ``CANARY`` a file that a stranger's code writes when it is imported there.
    """

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.port = home, port
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """A process with a Flower home and a canary of its own."""
        environment = {
            **commands.environment(self.home / f"{name}-flwr"), "CANARY": str(self.canary(name)),
            "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        with (self.home / f"{name}.log").open("wb") as log:
            self.started[name] = subprocess.Popen(
                [*command], stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.home
            )
        return self.started[name]

    def ours(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """``fedveil superlink ARGUMENTS``."""
        return self.start(name, sys.executable, "-m", "fedveil", "superlink", *arguments)

    def canary(self, name: str) -> Path:
        """What a stranger's import writes in process ``name`` or its children."""
        return self.home / f"{name}.canary"

    def installed(self, name: str) -> list[Path]:
        """Files of bundles below the Flower home of ``name``."""
        return [p for p in (self.home / f"{name}-flwr").rglob("*") if p.is_file() and p.suffix in (".py", ".toml")]

    def log(self, name: str) -> str:
        """What a process has said so far."""
        return (self.home / f"{name}.log").read_text(errors="replace")

    def until(self, what: str, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
        """Wait for ``condition``; the clock fails the test."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"== {n}\n{self.log(n)[-1500:]}" for n in self.started)
                pytest.fail(f"{what} did not happen in {timeout:g} s\n{logs}")
            time.sleep(0.1)

    def until_listening(self, port: int) -> None:
        """Wait until somebody accepts connections on ``port``."""
        self.until(f"a listener on {port}", lambda: listening(port))

    def stop(self) -> None:
        """End what still runs: by SIGTERM, so that Flower's own children end too."""
        for process in reversed(self.started.values()):
            if process.poll() is None:
                process.terminate()
        for process in self.started.values():
            try:
                process.wait(600)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(600)


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def world(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Processes]:
    """The demo's consortium (keys, contract, four hospitals' tables), nothing started."""
    home = tmp_path / "home"
    home.mkdir()
    processes = Processes(home, free_port())
    demo_hospitals.lay_out(home, processes.port, 0)
    yield processes
    processes.stop()


@pytest.fixture
def stranger() -> Callable[[str], bytes]:
    """A stranger's bundle of a given version, built as ``flwr run`` builds it; every version has another hash."""

    def bundle(version: str) -> bytes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Flower uses a deprecated name of pathspec's
            return build_fab_from_files(
                {
                    "pyproject.toml": _PROJECT.replace(b"1.0.0", version.encode()),
                    "stranger/__init__.py": b"",
                    "stranger/app.py": _APP,
                }
            )[0]

    return bundle
