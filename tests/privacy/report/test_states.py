"""The auditor takes every step again: an altered, missing or overlong sum, or another state, is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedveil.common import canonical
from fedveil.common.errors import VerificationError
from fedveil.common.identity import Roster
from fedveil.common.journal import parse
from fedveil.deploy.lab import simulate
from fedveil.privacy import norm_cap
from fedveil.privacy import plan as plans
from fedveil.privacy.report import bundle, history, states
from fedveil.privacy.report.verify import verify_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three rounds."""
    folder = tmp_path_factory.mktemp("states") / "run"
    simulate.run(simulate.Config(clients=4, dataset="trivial", sum="plain"), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def steps(run: Path) -> str:
    plan = plans.from_json(canonical.loads((run / "plan.json").read_bytes()))
    return states.steps(run, plan, history.replay(parse((run / "journal.jsonl").read_bytes())), roster(run))


def roster(run: Path) -> Roster:
    files = bundle.read(run)
    return bundle.open_roster(files, files.pin)


def test_an_honest_run_is_taken_again_step_by_step(run):
    report = verify_report(run / "report.json")
    assert report.ok
    assert any("3 steps taken again from the opened sums" in c.detail for c in report.checks)
    shutil.rmtree(run / "sums")
    report = verify_report(run / "report.json")
    assert report.ok
    assert any("opened sums are not here" in c.detail for c in report.checks)


def flip(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


SPOILED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "one bit of a sum": ("not the one that the journal names", lambda r: flip(r / "sums" / "2.bin")),
    "a sum cut short": ("not the one", lambda r: (r / "sums" / "2.bin").write_bytes(b"")),
    "a missing sum": ("2.bin is missing", lambda r: (r / "sums" / "2.bin").unlink()),
    "two sums exchanged": ("not the one", lambda r: shutil.copy(r / "sums" / "1.bin", r / "sums" / "2.bin")),
    "other members": (
        "not the one",
        lambda r: (r / "sums" / "1.json").write_bytes((r / "sums" / "1.json").read_bytes().replace(b"0004", b"0003")),
    ),
    "no object": ("not the one", lambda r: (r / "sums" / "1.json").write_bytes(b"[]")),
    "another start": ("start.f32 is not the model", lambda r: flip(r / "start.f32")),
    "no start": ("start.f32 is missing", lambda r: (r / "start.f32").unlink()),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_was_altered_is_named(run, what):
    said, spoil = SPOILED[what]
    spoil(run)
    with pytest.raises(VerificationError, match=said):
        steps(run)
    failed = [c for c in verify_report(run / "report.json").checks if not c.passed]
    assert [c.name for c in failed][:1] == ["model chain"]


def test_a_sum_longer_than_records_and_noise_can_make_it_is_not_accepted(run, monkeypatch):
    monkeypatch.setattr(norm_cap, "cap", lambda *_: 10)
    with pytest.raises(VerificationError, match="round 1: the opened sum is longer than"):
        steps(run)


def test_a_state_that_the_sum_does_not_lead_to_is_found(run):
    plan = plans.from_json(canonical.loads((run / "plan.json").read_bytes()))
    h = history.replay(parse((run / "journal.jsonl").read_bytes()))
    states.chain(h)
    h.applied[1].state_out = "0" * 64
    with pytest.raises(VerificationError, match="round 2 does not lead to"):
        states.steps(run, plan, h, roster(run))
    with pytest.raises(VerificationError, match="round 3 does not start from the model state"):
        states.chain(h)


def test_the_values_are_the_sums_that_the_sites_took(finished):
    plan = plans.from_json(canonical.loads((finished / "plan.json").read_bytes()))
    sums = [np.frombuffer((finished / "sums" / f"{n}.bin").read_bytes(), "<i4") for n in (1, 2, 3)]
    assert all(s.size == plan.model.parameters and s.any() for s in sums)
