"""A site whose disk is full, or was cut off while it wrote; and its share of the machine."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from threadpoolctl import threadpool_info

from fedveil.common import settings as files
from fedveil.common import threads
from fedveil.common.errors import ConfigError, JournalError
from fedveil.common.settings import SiteSettings
from fedveil.deploy import preflight, site_process
from fedveil.deploy.lab import demo_hospitals

EAST = "hospital-east"


@pytest.fixture
def settings(tmp_path: Path) -> SiteSettings:
    home = tmp_path / "home"
    home.mkdir()
    demo_hospitals.lay_out(home, 1, seed=0)
    return files.load(home / EAST / "site.toml", SiteSettings)


@pytest.fixture
def ledger(settings: SiteSettings) -> Path:
    site, _ = site_process.prepare(settings)
    site.ledger.close()
    return settings.site.state / site_process.LEDGER


def checked(settings: SiteSettings) -> preflight.Finding:
    return next(f for f in preflight.Preflight(settings, offline=True).run() if f.check == "ledger")


def test_a_site_that_allows_mode_client_counts_clients(settings: SiteSettings) -> None:
    def allowing(*modes: str) -> SiteSettings:
        return settings.model_copy(update={"limits": settings.limits.model_copy(update={"modes": modes})})

    with pytest.raises(ConfigError, match="beside others"):
        site_process.prepare(allowing("distributed", "client"))
    assert not settings.site.state.exists()
    site, _ = site_process.prepare(allowing("client"))
    site.ledger.close()
    assert site.ledger.tally.unit == "client"
    assert checked(allowing("client")).ok
    assert not checked(allowing("local")).ok
    assert not checked(allowing("local", "client")).ok
    with pytest.raises(JournalError, match="unit 'client'"):
        site_process.prepare(allowing("local"))


def test_a_row_that_was_cut_off_is_repaired_and_not_called_evidence(settings: SiteSettings, ledger: Path) -> None:
    whole = ledger.read_bytes()
    for torn in (b"{", whole.splitlines()[0][:-1]):
        ledger.write_bytes(whole + torn)
        found = checked(settings)
        assert found.ok
        assert "the next start drops it" in found.message
    site, _ = site_process.prepare(settings)
    assert "journal.repaired" in {r.kind for r in site.ledger.journal.rows}
    site.ledger.close()
    assert "cut off" not in checked(settings).message


@pytest.mark.parametrize("left", [b"", b'{"at":17'])
def test_a_ledger_of_no_whole_row_is_begun_again(settings: SiteSettings, ledger: Path, left: bytes) -> None:
    ledger.write_bytes(left)
    assert "first run" in checked(settings).message
    site, _ = site_process.prepare(settings)
    assert "ledger.open" in {r.kind for r in site.ledger.journal.rows}
    site.ledger.close()
    assert checked(settings).ok


def test_a_changed_end_stays_evidence(settings: SiteSettings, ledger: Path) -> None:
    whole = ledger.read_bytes()
    for end in (whole.splitlines()[0] + b" x", whole[:-2] + b"x"):
        ledger.write_bytes(whole + end if end.endswith(b" x") else end + b"\n")
        found = checked(settings)
        assert found.ok is False
        assert "evidence" in found.remedy
        with pytest.raises(JournalError, match="row"):
            site_process.prepare(settings)


def test_a_full_disk_ends_the_process_with_its_reason(settings: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answering on without a ledger would spend the others' rounds on a site that can no longer take part."""
    site, _ = site_process.prepare(settings)
    stop, real = threading.Event(), os.write
    found_as = site_process.found_as(site, stop)
    with found_as(Context(1, 2, {}, RecordDict(), {})) as same:
        assert same is site
    assert not stop.is_set()
    site_process.require_ledger(site)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(JournalError, match="No space"), found_as(Context(1, 2, {}, RecordDict(), {})):
        site.ledger.note("refused", session="a" * 64, reason="PolicyRefusal")
    monkeypatch.setattr(os, "write", real)
    assert stop.is_set()
    with pytest.raises(JournalError, match="could not be written") as e:
        site_process.require_ledger(site)
    assert (e.value.exit_code, e.value.hint) == (51, "free disk space")


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_process_with_a_full_disk_says_so_and_ends_with_52(settings: SiteSettings, tmp_path: Path, role: str) -> None:
    """The write itself fails, and such an error names no file: a site's report of its table, a server's plan."""
    home = tmp_path / "home"
    federation = home / "federation.toml"
    federation.write_text(federation.read_text().replace("127.0.0.1:1", "127.0.0.1:0"))
    assert settings.site.contract.is_file()
    command, room = {
        "client": (["client", "run", str(home / EAST / "site.toml")], 4096),
        "server": (["server", "start", str(federation)], 256),
    }[role]
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n" + (
        "from fedveil.common.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    first, second = done.stderr.splitlines()[-2:]
    assert (done.returncode, first.partition(" (")[0]) == (52, "StoreError: File too large"), done.stderr
    assert "free disk space" in second
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("check", "spoil", "remedy"),
    [
        ("data", lambda s: s.site.data.unlink(), "[site] data"),
        ("contract", lambda s: s.site.contract.unlink(), "[site] contract"),
        ("certificate", lambda s: (s.site.identity / "tls.pem").write_text("x"), "--reply"),
        ("disk", lambda s: s.site.state.write_text("a file"), "[site] state"),
    ],
)
def test_what_is_not_there_has_its_own_remedy(settings: SiteSettings, check: str, spoil: Any, remedy: str) -> None:
    spoil(settings)
    found = {f.check: f for f in preflight.Preflight(settings, offline=True).run()}
    assert found[check].ok is False
    assert remedy in found[check].remedy
    assert not any("fault of the program" in f.remedy for f in found.values())
    assert "quality.html" not in found["data"].remedy, "a page that was not written"


def test_threads_are_capped_in_every_library() -> None:
    def most() -> int:
        _ = np.ones((2, 2)) @ np.ones((2, 2))
        return max(x["num_threads"] for x in threadpool_info())

    before, own = (torch.get_num_threads(), most()), threads.in_use()
    torch.set_num_threads(2)
    site_process.threadpool_limits(2)
    try:
        assert (torch.get_num_threads(), most()) == (2, 2)
        site_process.cap_resources(files.TrainingSection(threads=1), "cpu")
        assert (torch.get_num_threads(), most(), threads.in_use()) == (1, 1, 1)
    finally:
        torch.set_num_threads(before[0])
        site_process.threadpool_limits(before[1])
        threads.use(own)


def test_more_threads_than_the_machine_has_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(site_process.os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(ConfigError, match=r"threads = 3, and this process may use 2") as e:
        site_process.cap_resources(files.TrainingSection(threads=3), "cpu")
    assert e.value.hint == "a number up to 2, or 0 for all"
