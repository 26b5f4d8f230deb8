"""Approvals: persons with keys of their own say yes, to one run, and nobody else can."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from typing import Any

import pytest

from fedveil.client import approval
from fedveil.client import round as line
from fedveil.client.approval import DOMAIN, Approvals, approve, find, reject, waiting
from fedveil.common import canonical, identity
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.settings import LimitsSection
from fedveil.common.units import Delta, Epsilon
from fedveil.privacy.ledger import Ledger


@pytest.fixture
def people():
    return [identity.new_signing_key() for _ in range(3)]


@pytest.fixture
def asked(world, people):
    """A site that wants two of three persons' approval, and was asked once."""
    listed = tuple(identity.public_hex(k) for k in people)
    w = world(limits={"approvals": 2, "approvers": listed})
    w.requests = w.folder / "site-1" / "requests"
    w.sites[0].approvals = Approvals(w.requests, w.sites[0].id, w.sites[0].limits)
    with pytest.raises(PolicyRefusal, match="approval of 2 persons") as e:
        line.join(w.sites[0], w.proposal())
    assert w.plan.hash in e.value.message
    return w


def ledger_of(w) -> str:
    return w.sites[0].head.ledger


def join(w, **changes):
    return line.join(w.sites[0], w.proposal(session=secrets.token_hex(32), **changes))


def yes(w, key, **more):
    return approve(find(w.requests, w.plan.hash[:12]), w.sites[0].id, w.sites[0].limits, key, **more)


def test_two_persons_one_run(asked, people):
    assert [w.given for w in waiting(asked.requests)] == [0]
    yes(asked, people[0])
    with pytest.raises(PolicyRefusal, match="has 1"):
        join(asked)
    yes(asked, people[0])  # the same person twice is one person
    with pytest.raises(PolicyRefusal, match="has 1"):
        join(asked)
    yes(asked, people[2])
    session = secrets.token_hex(32)
    line.join(asked.sites[0], asked.proposal(session=session))
    line.join(asked.sites[0], asked.proposal(session=session))  # a repeated request needs no second approval
    row = next(asked.sites[0].ledger.journal.of_kind("plan.approved"))
    assert row.body["session"] == session
    assert len(row.body["approvals"]) == 2
    with pytest.raises(PolicyRefusal, match="has 0"):  # used up, also after a restart
        join(asked)
    asked.reopen(0).approvals = Approvals(asked.requests, asked.sites[0].id, asked.sites[0].limits)
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked)


def test_what_a_person_is_shown(asked):
    shown = waiting(asked.requests)[0].to_json()
    assert shown["plan_hash"] == asked.plan.hash
    assert (shown["epsilon"], shown["steps"], shown["sites"]) == (2.0, 4, 4)
    json.dumps(shown)


def test_another_plan_needs_another_approval(asked, people, world):
    for key in people[:2]:
        yes(asked, key)
    other = world(steps=3).plan
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked, plan=other.to_json())
    assert len(waiting(asked.requests)) == 2
    reject(find(asked.requests, other.hash))
    assert len(waiting(asked.requests)) == 1


def test_a_stranger_cannot_approve(asked, people):
    stranger = identity.new_signing_key()
    with pytest.raises(ConfigError, match="not among"):
        yes(asked, stranger)
    # ... nor by writing the file by hand, under an approver's name
    said = {"v": 1, "site": "site-1", "plan_hash": asked.plan.hash, "ledger": ledger_of(asked), "at": 0,
            "until": 1 << 40, "nonce": ""}  # fmt: skip
    for key, name in ((stranger, stranger), (stranger, people[0]), (people[1], people[0])):
        path = asked.requests / asked.plan.hash / f"{identity.public_hex(name)}.json"
        path.write_bytes(canonical.dumps(identity.signed(key, DOMAIN, said)))
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked)


OTHERWISE: list[dict[str, Any]] = [
    {"site": "site-2"}, {"plan_hash": "0" * 64}, {"ledger": "0" * 64}, {"ledger": None}, {"until": 5}, {"at": 1 << 40},
    {"at": 10**299, "until": 10**300}, {"at": []}, {"at": None}, {"until": {}},
]  # fmt: skip


@pytest.mark.parametrize("change", [*OTHERWISE, {}])
def test_an_approval_for_something_else_or_another_time(asked, people, change):
    said = {"v": 1, "site": "site-1", "plan_hash": asked.plan.hash, "ledger": ledger_of(asked), "at": 0,
            "until": 1 << 40, "nonce": "n"} | change  # fmt: skip
    for key in people:
        path = asked.requests / asked.plan.hash / f"{identity.public_hex(key)}.json"
        path.write_bytes(canonical.dumps(identity.signed(key, DOMAIN, said)))
    if not change:  # the control
        join(asked)
        return
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked)


def test_an_altered_request_is_not_signed(asked, people, world):
    other = world(epsilon=2.5).plan
    path = asked.requests / asked.plan.hash / "request.json"
    path.write_bytes(canonical.dumps({**canonical.loads(path.read_bytes()), "plan": other.to_json()}))
    with pytest.raises(ConfigError, match="another plan"):
        approve(waiting(asked.requests)[0], asked.sites[0].id, asked.sites[0].limits, people[0])


def test_requests_do_not_pile_up(asked, world, monkeypatch):
    monkeypatch.setattr(approval, "MAX_WAITING", 2)
    join_with = [world(steps=s).plan.to_json() for s in (2, 3)]
    with pytest.raises(PolicyRefusal, match="needs the approval"):
        join(asked, plan=join_with[0])
    with pytest.raises(PolicyRefusal, match="wait for an approval"):
        join(asked, plan=join_with[1])
    assert len(waiting(asked.requests)) == 2
    assert len(list(asked.sites[0].ledger.journal.of_kind("refused"))) == 1


@pytest.mark.parametrize("run", ["", "abc", "f" * 64, "../../../x"])
def test_a_run_is_named_unambiguously(asked, run):
    with pytest.raises(ConfigError, match="0 waiting runs"):
        find(asked.requests, run)


def reopened(w):
    w.reopen(0).approvals = Approvals(w.requests, w.sites[0].id, w.sites[0].limits)


def test_requests_of_runs_that_began_do_not_fill_the_queue(asked, people, world, monkeypatch):
    monkeypatch.setattr(approval, "MAX_WAITING", 1)
    for _ in range(3):
        for key in people[:2]:
            yes(asked, key)
        join(asked)
        assert waiting(asked.requests) == []
        with pytest.raises(PolicyRefusal, match="has 0"):  # asked for once more, and written down once more
            join(asked)


def test_a_crash_before_the_request_is_removed_is_tidied_up(asked, people, world, monkeypatch):
    monkeypatch.setattr(approval, "MAX_WAITING", 1)
    for key in people[:2]:
        yes(asked, key)
    with monkeypatch.context() as m:
        m.setattr(Approvals, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            join(asked)
    reopened(asked)
    other = world(steps=3).plan
    with pytest.raises(PolicyRefusal, match="needs the approval"):
        join(asked, plan=other.to_json())
    assert [w.plan.hash for w in waiting(asked.requests)] == [other.hash]


def test_a_yes_that_came_after_the_run_began_is_kept(asked, people, monkeypatch):
    for key in people[:2]:
        yes(asked, key)
    monkeypatch.setattr(Approvals, "remove", lambda *_: None)
    join(asked)
    yes(asked, people[0])  # for the next run, before the folder was tidied
    with pytest.raises(PolicyRefusal, match="has 1"):
        join(asked)
    yes(asked, people[2])
    join(asked)


WRITTEN_ANEW = {
    "another key": lambda d: d | {"x": 1},
    "upper case": lambda d: d | {"signature": d["signature"].upper()},
    "blanks": lambda d: d | {"signature": " " + d["signature"]},
    "blanks within": lambda d: d | {"signature": d["signature"][:2] + " " + d["signature"][2:]},
    "the same": lambda d: d,
}


@pytest.mark.parametrize("how", WRITTEN_ANEW)
def test_a_used_approval_written_in_another_way_stays_used(asked, people, how):
    """What is signed counts once, however the file around it is written."""
    files = {path: canonical.loads(path.read_bytes()) for path in (yes(asked, key) for key in people[:2])}
    join(asked)
    for path, document in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(canonical.dumps(WRITTEN_ANEW[how](document)))
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked)


@pytest.mark.parametrize("how", list(WRITTEN_ANEW)[:-1])
def test_an_approval_has_one_form(asked, people, how):
    for key in people[:2]:
        path = yes(asked, key)
        path.write_bytes(canonical.dumps(WRITTEN_ANEW[how](canonical.loads(path.read_bytes()))))
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked)


def test_an_approval_named_in_the_ledger_by_its_whole_file_stays_used(asked, people):
    """Earlier versions wrote the digest of the file, signature and all."""
    files = [yes(asked, key) for key in people[:2]]
    whole = [canonical.digest(canonical.loads(f.read_bytes())) for f in files]
    asked.sites[0].ledger.note("plan.approved", session="0" * 64, plan_hash=asked.plan.hash, approvals=whole)
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked)


def test_a_run_uses_up_every_approval_there_is(asked, people):
    for key in people:
        yes(asked, key)
    join(asked)
    assert len(next(asked.sites[0].ledger.journal.of_kind("plan.approved")).body["approvals"]) == 3
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked)


def test_approvals_are_worth_nothing_in_a_new_ledger(asked, people):
    """Old files put back beside a ledger begun anew, which does not know that they were used."""
    for key in people[:2]:
        yes(asked, key)
    old = asked.folder / "old"
    shutil.copytree(asked.requests, old)
    join(asked)
    site, before = asked.sites[0], ledger_of(asked)
    site.ledger.close()
    site.ledger.journal.path.unlink()
    site.ledger = Ledger.open(
        site.ledger.journal.path, site.id, site.key, lineage="small", cap=Epsilon(asked.cap), delta=Delta(1e-5),
        clock=lambda: time.time() + 60,
    )  # fmt: skip
    assert ledger_of(asked) != before
    for folder in old.iterdir():
        shutil.copytree(folder, asked.requests / folder.name)
    assert [w.given for w in waiting(asked.requests)] == [2]
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked)
    [again] = waiting(asked.requests)
    assert (again.given, again.ledger) == (0, ledger_of(asked))  # asked for anew: the old request is nobody's
    for key in people[:2]:
        yes(asked, key)
    join(asked)


@pytest.mark.parametrize("text", [None, b"", b"[]", b"{}", b"not json", b'{"ledger":"x","plan":{}}'])
def test_one_request_that_cannot_be_read_does_not_hide_the_others(asked, people, world, caplog, text):
    other = world(steps=3).plan
    with pytest.raises(PolicyRefusal):
        join(asked, plan=other.to_json())
    path = asked.requests / asked.plan.hash / "request.json"
    path.unlink() if text is None else path.write_bytes(text)
    assert [w.plan.hash for w in waiting(asked.requests)] == [other.hash]
    assert asked.plan.hash in caplog.text, "it is said which one was passed over"
    assert find(asked.requests, other.hash[:12]).plan.hash == other.hash
    with pytest.raises(ConfigError, match=asked.plan.hash):  # and why, to whoever names it
        find(asked.requests, asked.plan.hash[:12])


def test_settings_that_cannot_hold():
    with pytest.raises(ValueError, match="as many different keys"):
        LimitsSection(max_epsilon=1.0, approvals=2, approvers=("0" * 64, "0" * 64))


def test_an_approval_by_root_can_be_read_by_the_site(asked, people, monkeypatch):
    """Whatever root's umask is: the file gets the folder's owner, and is never written through a link."""
    folder = asked.requests / asked.plan.hash
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    monkeypatch.setattr(os, "fchown", lambda fd, uid, gid: given.append((uid, gid)))
    path = yes(asked, people[0])
    assert given == [(folder.stat().st_uid, folder.stat().st_gid)]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_what_is_passed_over_is_said(asked, people, caplog):
    path = yes(asked, people[0])
    good = path.read_bytes()
    for bad, word in ((b"{}", "malformed"), (good.replace(b'"at":1', b'"at":2'), "malformed")):
        path.write_bytes(bad)
        caplog.clear()
        with pytest.raises(PolicyRefusal, match="has 0"):
            join(asked)
        assert word in caplog.text
    path.unlink()
    path.mkdir()  # a file that cannot be read: root can read all others
    caplog.clear()
    with pytest.raises(PolicyRefusal, match="has 0"):
        join(asked)
    assert "cannot be read" in caplog.text
    path.rmdir()
    path.write_bytes(good)
    caplog.clear()
    with pytest.raises(PolicyRefusal, match="has 1"):
        join(asked)
    assert not caplog.records


def test_a_folder_that_is_not_ones_own_names_the_account(asked, people, monkeypatch):
    wanted = find(asked.requests, asked.plan.hash[:12])

    def no(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", no)
    with pytest.raises(ConfigError, match="cannot be written") as e:
        yes(asked, people[0])
    assert "account" in e.value.hint
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "rmtree", no)
    with pytest.raises(ConfigError, match="cannot be removed"):
        reject(wanted)
    monkeypatch.undo()
    (asked.folder / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be read"):
        waiting(asked.folder / "file")
