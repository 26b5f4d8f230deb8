"""A hospital is revoked while a run goes on: it is shut out within seconds, and the run ends without it."""

from __future__ import annotations

import shutil
import signal

import pytest

from fedveil.deploy.enrol import consortium as authority
from fedveil.deploy.lab.demo_hospitals import HOSPITALS

WEST = HOSPITALS[-1]


@pytest.fixture(scope="module")
def revoked(consortium):
    c = consortium("revoked", steps=8)
    c.at_round("server", 4, "stop")  # so that the run is not over before the list is there
    c.everybody()
    c.until_stopped("server")
    folder = c.home / "pki" / "consortium"
    authority.revoke(folder, WEST)
    part = c.home / "pki" / "server" / "revoked.part"
    shutil.copy(folder / "revoked.json", part)
    part.rename(part.with_name("revoked.json"))
    c.processes["server"].send_signal(signal.SIGCONT)
    return c


def test_it_is_shut_out_and_told_why(revoked):
    assert revoked.code(WEST) == 80
    assert "was revoked by the consortium (list 1)" in revoked.log(WEST)


def test_the_others_finish_the_run(revoked):
    assert [revoked.code(name) for name in ("server", *HOSPITALS[:-1])] == [0, 0, 0, 0]
    applied = revoked.of_kind("round.applied")
    assert len(applied) == 8
    assert WEST in applied[2]["members"]
    assert applied[-1]["members"] == list(HOSPITALS[:-1])
