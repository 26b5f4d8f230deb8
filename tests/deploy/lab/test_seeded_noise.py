"""``--debug-noise-seed``: two runs have the same bits, on any engine; and everything says that they are not private."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fedveil as fv
from fedveil.common import cli, threads
from fedveil.common.errors import UsageError, VerificationError
from fedveil.deploy.lab import resuming, simulate
from fedveil.deploy.lab.simulate import Config
from fedveil.privacy.dp import noise, places, sampling
from fedveil.privacy.dp.debug_noise import replayed, seeded
from fedveil.privacy.report.verify import verify_report

SMALL = Config(clients=4, dataset="digits", sum="plain", steps=3, debug_noise_seed=7)


def ran(run: Path, config: Config) -> list[str]:
    """The hash of the whole state after every opened sum. (A ``keysum`` file also holds the errors of fresh keys.)"""
    simulate.run(config, run, report=False)
    states = [row.body["state"] for row in resuming.rows_of(run) if row.kind == "round.applied"]
    assert len(set(states)) == config.steps
    return states


@pytest.mark.parametrize("change", [{}, {"mode": "client", "force": True}, {"sum": "keysum"}, {"mode": "local"}])
def test_two_runs_are_the_same_bit_by_bit(tmp_path, change):
    config = replace(SMALL, **change)
    first, second = (ran(tmp_path / n, config) for n in "ab")
    assert first == second
    assert (tmp_path / "a" / "model.f32").read_bytes() == (tmp_path / "b" / "model.f32").read_bytes()
    other = ran(tmp_path / "c", replace(config, debug_noise_seed=8))
    assert not set(other) & set(first)
    if config.sum == "plain":
        for number in range(1, (config.steps or 0) + 1):
            a, b = ((tmp_path / n / "sums" / f"{number}.bin").read_bytes() for n in "ab")
            assert a == b
    free = [ran(tmp_path / n, replace(config, debug_noise_seed=None)) for n in "de"]
    assert not set(free[0]) & set(free[1])


def test_drop_outs_repeat_too(tmp_path):
    config = replace(SMALL, clients=8, dataset="trivial", steps=8, drop_rate=0.15, colluders=1, dropouts=3)
    for n in "ab":
        simulate.run(config, tmp_path / n, report=False)
    missing = [[r.body["members"] for r in resuming.rows_of(tmp_path / n) if r.kind == "round.set"] for n in "ab"]
    assert missing[0] == missing[1]
    assert len({len(m) for m in missing[0]}) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray leaves its own processes to the end of ours
@pytest.mark.parametrize("sum", ["plain", "keysum"])
def test_ray_opens_the_sums_of_the_engine_in_this_process(tmp_path, sum):
    config = replace(SMALL, sum=sum)
    assert ran(tmp_path / "a", config) == ran(tmp_path / "b", replace(config, engine="ray"))


def test_everything_says_that_it_is_not_private(tmp_path):
    run = tmp_path / "run"
    words = ("--clients", "4", "--dataset", "digits", "--sum", "plain", "--steps", "2", "--debug-noise-seed", "7")
    done = CliRunner().invoke(cli.build(), ["simulate", *words, "--out", str(run)])
    assert done.exit_code == 0, done.exception
    assert done.output.count("NOT PRIVATE") >= 2  # the bar's title and the table's
    assert "ε = " not in done.output.split("claim")[1].splitlines()[0]
    assert resuming.rows_of(run)[0].body["debug_noise_seed"] == 7
    assert json.loads((run / "config.json").read_text())["debug_noise_seed"] == 7
    assert all(json.loads(line)["not_private"] for line in (run / "metrics.jsonl").read_text().splitlines())
    payload = json.loads((run / "report.json").read_text())["payload"]
    assert payload["not_private"] is True
    assert payload["notice"].startswith("NOT PRIVATE")
    for name in ("report.html", "model-card.md", "data-card.md"):
        page = (run / name).read_text()
        assert "NOT PRIVATE" in page
        assert "NOT VERIFIED" in page or "not verified" in page.lower()
    found = verify_report(run / "report.json")
    assert [c.name for c in found.failures] == ["order of events"]
    assert found.claim == ""
    assert found.countersigned == ()
    loaded = fv.load(run)
    assert isinstance(loaded, fv.Run)
    for shown in (repr(loaded), loaded._repr_html_(), str(loaded.table())):
        assert "NOT PRIVATE" in shown
    with pytest.raises(VerificationError, match="NOT PRIVATE"):
        loaded.report.verify()


def test_a_run_without_a_seed_says_nothing_of_it(tmp_path):
    """Negative control of the test above."""
    run = tmp_path / "run"
    simulate.run(replace(SMALL, debug_noise_seed=None), run)
    assert verify_report(run / "report.json").ok
    for path in run.iterdir():
        if path.suffix in (".json", ".jsonl", ".html", ".md") and path.name != "config.json":
            assert b"NOT PRIVATE" not in path.read_bytes()
            assert b"debug_noise_seed" not in path.read_bytes()


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_out_of_range(tmp_path, seed):
    with pytest.raises(UsageError, match="out of range"):
        simulate.run(replace(SMALL, debug_noise_seed=seed), tmp_path)


class TestBlock:
    def test_outside_of_a_block_the_operating_system_is_asked(self):
        assert replayed(8) is None
        with seeded(1, 2, 3):
            assert replayed(8) is not None
        assert replayed(8) is None
        with pytest.raises(ZeroDivisionError), seeded(1):
            raise ZeroDivisionError
        assert replayed(8) is None

    def test_every_name_gives_other_bytes(self):
        def drawn(*names: int | str) -> bytes:
            with seeded(*names):
                return (replayed(16) or b"") + (replayed(16) or b"")

        names = [(1, 2, 3), (1, 3, 2), (12, 3), (1, 23), (1, "2", 3), (2, 2, 3)]
        assert len({drawn(*n) for n in names}) == len(names)
        assert drawn(1, 2, 3) == drawn(1, 2, 3)
        first = drawn(1, 2, 3)
        assert first[:16] != first[16:]

    @pytest.mark.parametrize("count", [1, 3])
    def test_noise_sample_and_places_repeat_for_any_number_of_threads(self, monkeypatch, count):
        monkeypatch.setattr(noise, "_CHUNK", 1000)

        def drawn():
            with seeded(5, 1, 1):
                return (
                    noise.discrete_gaussian(1e6, 5500), sampling.poisson_sample(700, 0.3), places.seat(40, 0.5, 40),
                )  # fmt: skip

        with monkeypatch.context() as one:
            one.setattr(threads, "_count", [1])
            expected = drawn()
        monkeypatch.setattr(threads, "_count", [count])
        assert all(np.array_equal(a, b) for a, b in zip(expected, drawn(), strict=True))
        assert not np.array_equal(expected[0], noise.discrete_gaussian(1e6, 5500))
