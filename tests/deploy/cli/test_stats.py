"""``fedveil stats``: a request that makes no sense is refused before anybody is asked, let alone charged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedveil.common import cli
from fedveil.common.errors import UsageError
from fedveil.common.workload.statistics import StatsSpec
from fedveil.deploy import server_process
from fedveil.deploy.cli import stats as cli_stats
from fedveil.deploy.lab import demo_hospitals, simulate


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats") / "home"
    folder.mkdir()
    demo_hospitals.lay_out(folder, 1, seed=0)
    return folder


@pytest.fixture
def asked(home: Path, monkeypatch: pytest.MonkeyPatch):
    """The command; no server is ever begun."""
    monkeypatch.setattr(server_process, "begin", lambda *_, **__: pytest.fail("a run was begun"))
    return lambda *words: (
        CliRunner().invoke(cli.build(), ["stats", str(home / "federation.toml"), *map(str, words)]).exception
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--what", ""), "names no statistic"),
        (("--what", " , "), "names no statistic"),
        (("--what", "quantiles", "--quantile", "nan"), "probability"),
        (("--what", "quantiles", "--quantile", "2"), "probability"),
        (("--what", "quantiles", *["--quantile", "0.5"] * 65), "probability"),
        (("--what", "accuracy"), "--model"),
        (("--what", "accuracy", "--model", "nowhere"), "no finished run"),
    ],
)
def test_a_wish_without_a_meaning(asked, words, said) -> None:
    refused = asked(*words)
    assert isinstance(refused, UsageError), refused
    assert said in str(refused)


def test_a_folder_that_holds_a_run_is_left_alone(asked, tmp_path) -> None:
    (tmp_path / "journal.jsonl").write_text("")
    refused = asked("--what", "count", "--run", tmp_path)
    assert isinstance(refused, UsageError)
    assert "with --run" in refused.hint


def test_the_limit_of_quantiles_is_the_specs() -> None:
    assert StatsSpec.model_fields["quantiles"].metadata[0].max_length == cli_stats.MAX_QUANTILES


def test_a_model_whose_plan_is_spoilt_is_named(asked, tmp_path) -> None:
    simulate.run(simulate.Config(clients=4, dataset="trivial", sum="plain", steps=1), tmp_path / "run", report=False)
    for name, text in (("a", "{"), ("b", "{}"), ("c", "\xff")):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        (tmp_path / name / "plan.json").write_text(text)
        refused = asked("--what", "accuracy", "--model", tmp_path / name)
        assert isinstance(refused, UsageError)
        assert str(tmp_path / name / "plan.json") in refused.message
