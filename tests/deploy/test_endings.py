"""What a process still does when its run has ended: the server makes the report, a site makes its own page."""

from __future__ import annotations

import json
import os
import queue
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedveil.common import identity
from fedveil.common.errors import UsageError, VerificationError
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.deploy import server_process, site_process
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.report import local


def terminated_after(kind: str) -> None:
    """SIGTERM while the server's journal ends with a row of ``kind``; a second one is not sent."""
    job = SimpleNamespace(journal=SimpleNamespace(rows=[SimpleNamespace(kind=kind)]), progress=lambda *_: None)
    with server_process._watched(cast(Any, job), queue.SimpleQueue()):
        os.kill(os.getpid(), signal.SIGTERM)


# After "round.applied" the next round's first row may be on disk already. "site.refused" may stand in mid-round.
@pytest.mark.parametrize("kind", ["run.end", "round.applied", "site.refused", "run.joined"])
def test_what_is_under_way_is_not_cut_off(kind: str):
    before = signal.getsignal(signal.SIGTERM)
    terminated_after(kind)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit) as e:  # negative control: while it waits for its sites it stops at once
        terminated_after("run.open")
    assert e.value.code == server_process.STOPPED


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """As much of a site as its own page needs: settings, a ledger, no contract."""
    ledger = Ledger.open(
        tmp_path / "ledger.jsonl", SiteId("berg"), identity.new_signing_key(), lineage="berg", cap=Epsilon(2.0),
        delta=Delta(1e-5), durable=False,
    )  # fmt: skip
    (tmp_path / "data").mkdir()
    settings = SimpleNamespace(site=SimpleNamespace(state=tmp_path))
    yield cast(Any, settings), cast(Any, SimpleNamespace(ledger=ledger, contract=None))
    ledger.close()


def test_a_page_of_its_own_is_written_before_there_was_any_session(site: tuple[Any, Any], tmp_path: Path):
    said: list[str] = []
    site_process.write_local_report(*site, said.append)
    written = json.loads((tmp_path / "data" / local.LOCAL_JSON).read_text())
    assert (written["site"], written["sessions"], written["signed_report"]) == ("berg", [], None)
    assert said == [f"local report: {tmp_path / 'data' / local.LOCAL_PAGE}; it stays here"]


@pytest.mark.parametrize("error", [UsageError("rendering needs jinja2"), VerificationError("no"), PermissionError("x")])
def test_a_page_that_cannot_be_written_is_said_and_hides_nothing(
    site: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(local, "write", failing)
    said: list[str] = []
    site_process.write_local_report(*site, said.append)
    assert len(said) == 1
    assert said[0].startswith("the local report could not be written")


def test_a_mistake_of_the_program_is_not_swallowed(site: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    def failing(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(local, "write", failing)
    with pytest.raises(KeyError):
        site_process.write_local_report(*site, lambda _: None)
