"""The monitor: what it shows of a run folder, what it refuses, and that it leaves the run alone."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedveil.common import canonical
from fedveil.common.errors import JournalError, TransportError
from fedveil.deploy.watch import monitor, monitor_web
from fedveil.deploy.watch.monitor import Health, RunView, Tail, held, metrics_text, refreshed
from fedveil.deploy.watch.monitor_web import Monitor, page

PLAN = {"steps": 5, "epsilon": 2.0, "delta": 1e-5, "sites": 3}
SITES = ["a", "b", "c"]


def row(kind: str, **body: object) -> bytes:
    return canonical.dumps({"kind": kind, "at": 1_700_000_000, "body": {"session": "5" * 64, **body}}) + b"\n"


OPEN = row("run.open", engine="grpc", simulated=False)
JOINED = row("run.joined", sites=SITES)


def round_(number: int, members: list[str]) -> bytes:
    return row("round.open", round=number) + row("round.applied", round=number, members=members)


def line(number: int, members: int = 3, epsilon: float = 0.5) -> bytes:
    facts = {
        "round": number, "epsilon_opened": epsilon, "members": members, "metrics": {"auc": 0.75} if members else {},
        "bytes_sent": 1000, "bytes_received": 2000, "seconds": 0.25,
    }  # fmt: skip
    return json.dumps(facts).encode() + b"\n"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run after two rounds; b was missing in the second, d was never admitted."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "plan.json").write_bytes(canonical.dumps(PLAN))
    (folder / "config.json").write_text(json.dumps({"federation": {"name": "north"}}))
    rows = [
        OPEN, row("join.refused", site="d", code="IdentityError"), JOINED, round_(1, SITES),
        row("site.refused", site="b", code="PolicyRefusal"), round_(2, ["a", "c"]),
    ]  # fmt: skip
    (folder / "journal.jsonl").write_bytes(b"".join(rows))
    (folder / "metrics.jsonl").write_bytes(line(1) + line(2, 2, 0.7))
    return folder


def view_of(folder: Path) -> RunView:
    view = RunView(folder)
    view.refresh()
    return view


class TestTail:
    def test_only_whole_lines_each_once(self, tmp_path):
        path = tmp_path / "f"
        path.write_bytes(b"one\ntw")
        tail = Tail(path, lambda: None)
        assert list(tail.lines()) == [b"one"]
        assert list(tail.lines()) == []
        with path.open("ab") as f:
            f.write(b"o\nthree\n")
        assert list(tail.lines()) == [b"two", b"three"]

    @pytest.mark.parametrize("replace", [True, False])
    def test_a_file_that_was_replaced_or_cut_is_read_anew(self, tmp_path, replace):
        path, restarts = tmp_path / "f", []
        path.write_bytes(b"one\ntwo\n")
        tail = Tail(path, lambda: restarts.append(1))
        list(tail.lines())
        (tmp_path / "g").write_bytes(b"one\n")
        (tmp_path / "g").replace(path) if replace else os.truncate(path, 4)
        assert list(tail.lines()) == [b"one"]
        assert len(restarts) == 2

    def test_a_line_that_was_not_taken_is_given_again(self, tmp_path):
        path = tmp_path / "f"
        path.write_bytes(b"bad\ngood\n")
        tail = Tail(path, lambda: None)
        with contextlib.suppress(ValueError):
            for _ in tail.lines():
                raise ValueError
        assert list(tail.lines()) == [b"bad", b"good"]

    def test_an_endless_line_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(monitor, "MAX_LINE", 10)
        (tmp_path / "f").write_bytes(b"x" * 11)
        with pytest.raises(JournalError, match="more than 10 bytes"):
            list(Tail(tmp_path / "f", lambda: None).lines())


class TestView:
    def test_figures(self, run):
        v = view_of(run)
        assert (v.name, v.engine, v.applied, v.aborted, v.epsilon_opened) == ("north", "grpc", 2, 0, 0.7)
        assert (v.sent, v.received, v.seconds) == (2000, 4000, 0.5)
        assert {n: (s.rounds, s.last_round) for n, s in v.sites.items()} == {
            "a": (2, 2), "b": (1, 1), "c": (2, 2), "d": (0, 0),
        }  # fmt: skip
        assert v.sites["b"].refusals == {"PolicyRefusal": 1}
        assert v.joined == SITES

    def test_growing_gives_what_reading_at_once_gives(self, run):
        whole = {n: (run / n).read_bytes() for n in ("journal.jsonl", "metrics.jsonl")}
        for name in whole:
            (run / name).write_bytes(b"")
        slow = RunView(run)
        for cut in range(0, max(map(len, whole.values())) + 97, 97):
            for name, data in whole.items():
                with (run / name).open("ab") as f:
                    f.write(data[cut : cut + 97])
            slow.refresh()
        at_once = view_of(run)
        assert metrics_text(slow, Health("running")) == metrics_text(at_once, Health("running"))
        assert list(slow.rounds) == list(at_once.rounds)

    def test_lines_that_a_resumed_server_dropped_are_forgotten(self, run):
        v = view_of(run)
        (run / "part").write_bytes(line(1))
        (run / "part").replace(run / "metrics.jsonl")
        v.refresh()
        assert (v.sent, v.epsilon_opened, len(v.rounds)) == (1000, 0.5, 1)

    def test_old_rounds_leave_the_page_not_the_sums(self, run, monkeypatch):
        monkeypatch.setattr(monitor, "KEPT_ROUNDS", 4)
        (run / "metrics.jsonl").write_bytes(b"".join(line(i) for i in range(1, 11)))
        v = view_of(run)
        assert [r["round"] for r in v.rounds] == [7, 8, 9, 10]
        assert v.sent == 10_000

    @pytest.mark.parametrize("bad", [b"{}\n", b"[1]\n", b"nonsense\n", b'{"kind":"run.open","at":1,"body":{}}\n'])
    def test_what_no_server_writes_stays_unreadable(self, run, bad, caplog):
        with (run / "journal.jsonl").open("ab") as f:
            f.write(bad)
        v = RunView(run)
        assert refreshed(v).status == "unreadable"
        assert refreshed(v).status == "unreadable"
        assert caplog.records


class TestHealth:
    def test_a_folder_without_a_run_waits(self, tmp_path):
        v = view_of(tmp_path / "not yet")
        assert v.health() == Health("waiting")
        assert v.health().ok
        assert "Waiting for a run" in page(v, v.health())

    def test_running_while_the_journal_is_held_stopped_after(self, run):
        v = view_of(run)
        with (run / "journal.jsonl").open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            if not held(run / "journal.jsonl"):
                pytest.skip("this system does not show its locks")
            assert v.health() == Health("running", True)
        assert v.health() == Health("stopped", False)
        assert not v.health().ok

    def test_the_absence_of_a_lock_says_something_only_to_who_sees_every_process(self, run, monkeypatch):
        monkeypatch.setattr(monitor, "held", lambda path: False)
        for sees, expected in ((False, Health("running")), (True, Health("stopped", False))):
            monkeypatch.setattr(monitor, "sees_every_process", lambda sees=sees: sees)
            assert view_of(run).health() == expected

    def test_namespaces(self, tmp_path):
        for target, sees in (("pid:[4026531836]", True), ("pid:[4026532201]", False)):
            (tmp_path / target).symlink_to(target)
            assert monitor.sees_every_process(tmp_path / target) is sees
        assert not monitor.sees_every_process(tmp_path / "none")

    def test_locks_of_the_kernels_list(self, tmp_path):
        path, locks = tmp_path / "j", tmp_path / "locks"
        path.write_text("")
        inode = path.stat().st_ino
        locks.write_text(
            f"1: POSIX  ADVISORY  WRITE 7 fe:00:{inode} 0 EOF\n2: FLOCK  ADVISORY  WRITE 7 fe:00:1 0 EOF\n"
        )
        assert held(path, locks) is False
        locks.write_text(f"1: FLOCK  ADVISORY  WRITE 7 00:2f:{inode} 0 EOF\n")
        assert held(path, locks) is True
        locks.write_text("")
        assert held(path, locks) is False
        assert held(path, tmp_path / "none") is None

    def test_an_unknown_holder_is_not_an_alarm(self, run, monkeypatch):
        monkeypatch.setattr(monitor, "held", lambda path: None)
        assert view_of(run).health() == Health("running", None)

    def test_ended(self, run):
        with (run / "journal.jsonl").open("ab") as f:
            f.write(row("run.end", status="COMPLETED", metrics={"auc": 0.8}))
        v = view_of(run)
        assert v.health() == Health("ended")
        assert "Ended: COMPLETED" in page(v, v.health())
        assert 'fedveil_public_test_metric{metric="auc"} 0.8' in metrics_text(v, v.health())


_SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (-?[0-9.e+-]+)')


class TestMetrics:
    def test_every_line_is_of_the_format_and_families_are_whole(self, run):
        v = view_of(run)
        v.name = 'quo"te\\back\nline'
        seen, family = [], ""
        for text in metrics_text(v, Health("running", True)).splitlines():
            if text.startswith("# HELP "):
                family = text.split()[2]
                assert family not in seen
                seen.append(family)
            elif text.startswith("# TYPE "):
                assert text.split()[2] == family
                assert text.split()[3] in ("gauge", "counter")
                assert family.endswith("_total") == text.endswith("counter")
            else:
                found = _SAMPLE.fullmatch(text)
                assert found, text
                assert found[1] == family
        assert "fedveil_epsilon_opened" in seen

    def test_values(self, run):
        text = metrics_text(view_of(run), Health("running", True))
        for wanted in (
            "fedveil_epsilon_opened 0.7", "fedveil_epsilon_planned 2.0", 'fedveil_rounds_total{outcome="applied"} 2',
            'fedveil_bytes_total{direction="from_sites"} 4000', 'fedveil_site_rounds_total{site="b"} 1',
            'fedveil_site_refusals_total{site="d",code="IdentityError"} 1', "fedveil_server_alive 1",
            'fedveil_run_status{status="running"} 1', "fedveil_last_event_timestamp_seconds 1700000000",
        ):  # fmt: skip
            assert f"{wanted}\n" in text

    def test_unknown_liveness_has_no_sample(self, run):
        assert "server_alive" not in metrics_text(view_of(run), Health("running"))


class TestPage:
    def test_what_it_says(self, run):
        v = view_of(run)
        text = page(v, Health("running", True))
        for wanted in (
            "north",
            "0.7",
            "of 2",
            "PolicyRefusal",
            "IdentityError",
            "2.0 kB",
            "4.0 kB",
            "fedveil audit verify",
        ):
            assert wanted in text
        assert text.count("<svg") == 4

    def test_nothing_from_elsewhere_and_no_script(self, run):
        text = page(view_of(run), Health("running"))
        assert "<script" not in text
        assert not re.search(r'(?:src|href)="(?!/)', text)
        assert "url(" not in text
        assert "http://" not in text
        assert "https://" not in text

    def test_names_are_escaped(self, run):
        evil = "<img src=x>"
        with (run / "journal.jsonl").open("ab") as f:
            f.write(row("site.refused", site=evil, code=evil))
        (run / "config.json").write_text(json.dumps({"federation": {"name": evil}}))
        with (run / "metrics.jsonl").open("ab") as f:
            f.write(line(3).replace(b"auc", evil.encode()))
        v = view_of(run)
        text = page(v, Health("running"))
        assert evil not in text
        assert text.count("&lt;img src=x&gt;") >= 4

    def test_simulated_is_marked(self, run):
        v = view_of(run)
        assert "SIMULATED" not in page(v, Health("running"))
        v.simulated = True
        assert "SIMULATED" in page(v, Health("running"))

    def test_stopped_says_how_to_go_on(self, run):
        assert f"fedveil server resume federation.toml {run}" in page(view_of(run), Health("stopped", False))


@pytest.fixture
def served(run) -> Iterator[Monitor]:
    m = Monitor(run, 0)
    thread = threading.Thread(target=m.serve)
    thread.start()
    yield m
    m.close()
    thread.join(600)
    assert not thread.is_alive()


def ask(m: Monitor, path: str, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], str]:
    c = http.client.HTTPConnection("127.0.0.1", m.port, timeout=60)
    try:
        c.request(method, path, headers={} if host is None else {"Host": host})
        r = c.getresponse()
        return r.status, {k.lower(): v for k, v in r.getheaders()}, r.read().decode()
    finally:
        c.close()


class TestServer:
    def test_three_addresses(self, served):
        status, headers, body = ask(served, "/")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "<h1>" in body
        assert ask(served, "/metrics?x=1")[2].startswith("# HELP fedveil_")
        assert json.loads(ask(served, "/healthz")[2])["ending"] == ""
        assert ask(served, "/etc/passwd")[0] == 404
        assert ask(served, "/../journal.jsonl")[0] == 404

    def test_health_is_a_status_code(self, served, monkeypatch):
        for holds, status in ((True, 200), (False, 503), (None, 200)):
            monkeypatch.setattr(monitor, "held", lambda path, holds=holds: holds)
            assert ask(served, "/healthz")[0] == status

    def test_head_has_no_body_and_other_methods_are_refused(self, served):
        status, headers, body = ask(served, "/", "HEAD")
        assert (status, body) == (200, "")
        assert int(headers["content-length"]) > 1000
        assert ask(served, "/", "POST")[0] == 501

    @pytest.mark.parametrize(
        "host", ["localhost", "localhost:9464", "127.0.0.1:1", "[::1]", "[::1]:9464", "LOCALHOST:80"]
    )
    def test_names_of_loopback(self, served, host):
        assert ask(served, "/healthz", host=host)[0] in (200, 503)

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "evil.example:9464", "", "localhost.evil.example", "127.0.0.1.nip.example", "localhost:x"],
    )
    def test_other_names_read_nothing(self, served, host):
        status, _, body = ask(served, "/", host=host)
        assert status == 421
        assert "north" not in body

    def test_it_listens_on_loopback_only(self, served):
        assert served._server.server_address[0] == "127.0.0.1"

    def test_a_port_in_use_is_said(self, served, tmp_path):
        with pytest.raises(TransportError, match=str(served.port)):
            Monitor(tmp_path, served.port)

    def test_silent_peers_take_neither_all_places_nor_for_ever(self, run, monkeypatch):
        monkeypatch.setattr(monitor_web, "PATIENCE_S", 0.2)
        m = Monitor(run, 0)
        thread = threading.Thread(target=m.serve)
        thread.start()
        silent = [socket.create_connection(("127.0.0.1", m.port)) for _ in range(2 * monitor_web.MAX_REQUESTS)]
        try:
            answers = list[int]()
            while not answers:  # for ever, if they kept their places
                with contextlib.suppress(OSError, http.client.HTTPException):
                    answers.append(ask(m, "/healthz")[0])
            assert answers[0] in (200, 503)
        finally:
            for s in silent:
                s.close()
            m.close()
            thread.join(600)

    def test_a_slow_loris_is_hung_up(self, run, monkeypatch):
        monkeypatch.setattr(monitor_web, "PATIENCE_S", 0.3)
        m = Monitor(run, 0)
        thread = threading.Thread(target=m.serve)
        thread.start()
        try:
            with socket.create_connection(("127.0.0.1", m.port)) as s, contextlib.suppress(ConnectionError):
                s.settimeout(0.05)
                came = b"?"
                while came:  # for ever, if every further byte bought it more time
                    s.sendall(b"G")
                    with contextlib.suppress(TimeoutError):
                        came = s.recv(1)
        finally:
            m.close()
            thread.join(600)

    def test_the_run_folder_is_left_as_it_was(self, served, run):
        before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir()}
        for path in ("/", "/metrics", "/healthz"):
            ask(served, path)
        assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir()} == before
