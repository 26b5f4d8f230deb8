"""A small consortium on loopback whose members are processes of their own, and ways to make them fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedveil.common.journal import Row, parse
from fedveil.deploy.lab import demo_hospitals
from fedveil.deploy.lab.demo_hospitals import HOSPITALS

PATIENCE = 600.0
_ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


class Forks:
    """Starts commands by forking one process that has imported everything (``forks.py``)."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("forks.py")
        self._server = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_ENV, text=True
        )
        assert self._server.stdout is not None
        assert json.loads(self._server.stdout.readline())["ready"]

    def ask(self, request: dict[str, Any]) -> Any:
        """One line there, one line back."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End it, and with it whatever it started."""
        self._server.communicate()


class Forked:
    """One forked command, with the few methods of ``subprocess.Popen`` that the tests use."""

    def __init__(self, forks: Forks, argv: list[str], cwd: Path, log: Path, fault: dict[str, Any] | None) -> None:
        self._forks, self._code = forks, None
        self.pid = int(forks.ask({"start": {"argv": argv, "cwd": str(cwd), "log": str(log), "fault": fault}})["pid"])

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._forks.ask({"poll": self.pid})["code"]
        return self._code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fedveil", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Consortium:
    """Four hospitals and a server below ``home``; every process that is started here is ended here.

    With ``forks`` None, every process is ``python -m fedveil ...``, as a person would start it.
    """

    def __init__(
        self, home: Path, template: Path, forks: Forks | None, port: int, *, steps: int, round_timeout: int = 300,
        grace: int = 3, join_timeout: int = 300,
    ) -> None:  # fmt: skip
        self.home, self.run, self.forks = home, home / "run", forks
        shutil.copytree(template, home)
        self.port = port
        here = ('127.0.0.1:1"', f'127.0.0.1:{self.port}"')
        self.replace(
            home / "federation.toml", here, ("steps = 20", f"steps = {steps}"),
            ("round_timeout = 30", f"round_timeout = {round_timeout}"), ("grace = 5", f"grace = {grace}"),
            ("join_timeout = 60", f"join_timeout = {join_timeout}\nkeep_ciphertexts = true"),
        )  # fmt: skip
        for site in HOSPITALS:
            self.replace(home / site / "site.toml", here)
        self.processes: dict[str, subprocess.Popen[bytes] | Forked] = {}
        self.faults: dict[str, dict[str, Any]] = {}  # by process: what its next start does to itself (forks.py)

    @staticmethod
    def replace(path: Path, *pairs: tuple[str, str]) -> None:
        """Edit a settings file; a text that is not there is a fault of the test."""
        text = path.read_text()
        for old, new in pairs:
            assert old in text, f"{old!r} is not in {path.name}"
            text = text.replace(old, new)
        path.write_text(text)

    def start(
        self, name: str, *arguments: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes] | Forked:
        """``fedveil ARGUMENTS`` as a process; its output goes to ``name.log``. ``env`` is for one not forked."""
        path = self.home / f"{name}.log"
        path.touch()
        if self.forks is not None:
            fault = self.faults.pop(name, None)
            self.processes[name] = Forked(self.forks, [*arguments], self.home, path, fault)
        else:
            with path.open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "fedveil", *arguments], stdout=log, stderr=subprocess.STDOUT,
                    env=_ENV | dict(env or {}), cwd=self.home,
                )  # fmt: skip
        return self.processes[name]

    def start_in(self, line: Line, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """:meth:`start`, as a process of its own behind ``line``."""
        with (self.home / f"{name}.log").open("ab") as log:
            command = [*line.prefix, sys.executable, "-m", "fedveil", *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_ENV, cwd=self.home)
        self.processes[name] = process
        return process

    def server(self, verb: str = "start") -> subprocess.Popen[bytes] | Forked:
        """``fedveil server start`` or ``resume``."""
        run = ["--run", str(self.run)] if verb == "start" else [str(self.run)]
        return self.start("server", "server", verb, "federation.toml", *run)

    def site(self, site: str, *more: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes] | Forked:
        """``fedveil client run`` of one hospital."""
        return self.start(site, "client", "run", f"{site}/site.toml", *more, env=env)

    def everybody(self) -> None:
        """The server and all hospitals."""
        self.server()
        for site in HOSPITALS:
            self.site(site)

    def at_round(self, name: str, number: int, do: str) -> None:
        """What the server, or a hospital, does to itself before it opens, or contributes to, round ``number``."""
        target = {"target": "fedveil.common.journal:Journal.append", "kind": "round.open"}
        if name != "server":
            target = {"target": "fedveil.client.round:contribute"}
        self.faults[name] = {**target, "when": "before", "nth": number, "do": do}

    def until_stopped(self, name: str) -> None:
        """Wait until a process stands still."""
        stat = Path(f"/proc/{self.processes[name].pid}/stat")
        self.until(f"{name} stands still", lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def kill(self, *names: str) -> None:
        """kill -9, all of them before any is waited for."""
        for name in names:
            self.processes[name].send_signal(signal.SIGKILL)
        for name in names:
            assert self.processes[name].wait(PATIENCE) == -signal.SIGKILL

    def code(self, name: str, timeout: float = PATIENCE) -> int:
        """The exit code of a process, once it has ended."""
        try:
            return self.processes[name].wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name} did not end in {timeout:g} s: {self.log(name)[-2000:]}")

    def log(self, name: str) -> str:
        """What a process has said so far."""
        return (self.home / f"{name}.log").read_text(errors="replace")

    def until(self, what: str, condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
        """Wait for ``condition``; the server's early end or the clock fails the test."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{what} did not happen in {timeout:g} s: {self.log('server')[-2000:]}")
            time.sleep(0.002)

    def until_round(self, number: int) -> None:
        """Wait until the server has finished round ``number``; the run must still be under way then."""
        self.until(f"round {number}", lambda: len(self.metrics()) >= number)
        assert self.processes["server"].poll() is None, self.log("server")[-2000:]

    def metrics(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def journal(self) -> list[Row]:
        """The server's journal."""
        return parse((self.run / "journal.jsonl").read_bytes())

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The bodies of the server's rows of one kind."""
        return [r.body for r in self.journal() if r.kind == kind]

    def ledger(self, site: str) -> list[Row]:
        """A hospital's own ledger, from its own folder."""
        return parse((self.home / site / "state" / "ledger.jsonl").read_bytes())

    def charged(self, site: str) -> list[int]:
        """The rounds of this run that a hospital was charged for, in order of charge."""
        session = self.of_kind("run.open")[0]["session"]
        return [r.body["round"] for r in self.ledger(site) if r.kind == "spend" and r.body["session"] == session]

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait(PATIENCE)


class Line:
    """A way to the server that can be cut without a word, as when a cable is pulled, and mended."""

    prefix: tuple[str, ...] = ()
    host = "127.0.0.1"

    def route(self, port: int) -> int:
        """The port of ``host`` at which a server that listens on ``host``'s ``port`` is reached over this line."""
        raise NotImplementedError

    def cut(self) -> None:
        """From now on nothing passes, and nobody is told."""
        raise NotImplementedError

    def mend(self) -> None:
        """Let everything pass again, new connections and what old ones send again."""
        raise NotImplementedError

    def close(self) -> None:
        """Take the line down."""


class Namespace(Line):
    """A network namespace of its own, with one virtual cable to this one; needs root."""

    def __init__(self) -> None:
        self.name = f"fv{os.getpid() % 100_000}"
        self.host = "10.213.77.1"
        self.prefix = ("ip", "netns", "exec", self.name)
        near, far = f"{self.name}a", f"{self.name}b"
        self._far = far
        try:
            self._ip("netns", "add", self.name)
            self._ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", self.name)
            self._ip("addr", "add", f"{self.host}/30", "dev", near)
            self._ip("link", "set", near, "up")
            self._ip("-n", self.name, "addr", "add", "10.213.77.2/30", "dev", far)
            self.mend()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def route(self, port: int) -> int:
        return port

    def cut(self) -> None:
        self._ip("-n", self.name, "link", "set", self._far, "down")

    def mend(self) -> None:
        self._ip("-n", self.name, "link", "set", self._far, "up")

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


class Relay(Line):
    """A TCP relay in this process that can stop forwarding; old connections stay dead when it goes on."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._open, self._dead = True, threading.Event()

    def route(self, port: int) -> int:
        self._target = port
        threading.Thread(target=self._accept, daemon=True).start()
        return int(self._listener.getsockname()[1])

    def cut(self) -> None:
        self._open = False
        self._dead.set()

    def mend(self) -> None:
        self._open, self._dead = True, threading.Event()

    def close(self) -> None:
        for s in (self._listener, *self._sockets):
            s.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            try:
                if not self._open:
                    continue  # taken and never answered
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()  # nobody listens behind the relay
                continue
            self._sockets.append(far)
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(a, b, self._dead), daemon=True).start()

    @staticmethod
    def _pump(a: socket.socket, b: socket.socket, dead: threading.Event) -> None:
        try:
            while data := a.recv(1 << 16):
                if not dead.is_set():
                    b.sendall(data)
            if not dead.is_set():
                b.shutdown(socket.SHUT_WR)
        except OSError:
            return


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    """A network namespace where this account may make one, a relay otherwise."""
    try:
        made: Line = Namespace()
    except (OSError, subprocess.SubprocessError):
        made = Relay()
    yield made
    made.close()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, contract, settings and tables; copied for every consortium."""
    folder = tmp_path_factory.mktemp("template") / "home"
    folder.mkdir()
    demo_hospitals.lay_out(folder, 1, seed=0)
    return folder


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """The process to fork from."""
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def consortium(
    template: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    free_port: Callable[[], int],
) -> Iterator[Callable[..., Consortium]]:
    """A maker of consortia."""
    made: list[Consortium] = []

    def make(name: str, *, forked: bool = True, **options: Any) -> Consortium:
        forks, port = request.getfixturevalue("forks") if forked else None, free_port()
        made.append(Consortium(tmp_path_factory.mktemp(name) / "home", template, forks, port, **options))
        return made[-1]

    yield make
    for c in made:
        c.stop()
