"""A consortium and its members, who exchange files as they would over a network that nobody trusts."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedveil.common import identity
from fedveil.deploy.enrol import consortium
from fedveil.deploy.enrol import join as enrol

NAMES = ("server", "east", "west")


class Members:
    """A consortium and three members, each in a folder of its own, that exchange files."""

    def __init__(self, home: Path) -> None:
        self.home, self.consortium = home, home / "consortium"
        self.pin = consortium.found(self.consortium, "hearts")
        self.count = 0

    def host(self, name: str) -> str:
        return "fl.example.org" if name == "server" else ""

    def ask(self, name: str) -> str:
        return enrol.request(self.home / name, name, host=self.host(name))

    def sign(self, name: str, heard: str = "", days: int = 30) -> Path:
        self.count += 1
        out = self.home / f"reply-{self.count}.json"
        consortium.sign_request(self.consortium, self.home / name / "request.json", out, heard=heard, days=days)
        return out

    def admit(self, name: str) -> None:
        enrol.install(self.home / name, self.sign(name, self.ask(name)), consortium_key=self.pin)

    def publish(self) -> identity.Roster:
        made = consortium.publish(self.consortium)
        for name in NAMES:
            if (self.home / name / "consortium.pub").exists():
                enrol.take_roster(self.home / name, self.consortium / "roster.json")
        return made


@pytest.fixture
def members(tmp_path: Path) -> Members:
    m = Members(tmp_path)
    for name in NAMES:
        m.admit(name)
    m.publish()
    return m


@pytest.fixture
def new_members() -> type[Members]:
    """:class:`Members`, to be made in a folder; nobody is admitted yet."""
    return Members
