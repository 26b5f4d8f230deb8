"""``fedveil compare``: what differs becomes a column, baselines stand beside, the page needs nothing from outside."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

import fedveil as fv
from fedveil.common import cli
from fedveil.common.errors import UsageError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home, sites = tmp_path_factory.mktemp("compare"), fv.split("trivial", clients=4)
    for name, epsilon, more in (("a", 1.0, False), ("b", 4.0, True)):
        fv.simulate(
            "logistic", sites, epsilon=epsilon, sum="plain", steps=2, out=home / name, compare=more, report=False,
            quiet=True,
        )  # fmt: skip
    return home / "a", home / "b"


def test_what_differs_is_compared(folders):
    runs = fv.compare(folders)
    assert runs.varied == ("epsilon",)
    assert [row["epsilon"] for row in runs.table()] == [1.0, 4.0]


def test_runs_without_a_config_are_compared_by_their_plans(folders, tmp_path):
    import shutil

    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
        (tmp_path / folder.name / "config.json").unlink()
    runs = fv.compare([tmp_path / "a", tmp_path / "b"])
    assert runs.varied == ("epsilon",)
    assert [round(row["epsilon"], 2) for row in runs.table()] == [1.0, 4.0]


def test_the_command_shows_a_table_and_writes_page_and_csv(folders, tmp_path):
    words = ["compare", *map(str, folders), "--out", str(tmp_path / "c.html"), "--csv", str(tmp_path / "c.csv")]
    done = CliRunner().invoke(cli.build(), words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.exception
    assert "pooled, no privacy" in done.output
    page = (tmp_path / "c.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "They differ in: epsilon" in page
    assert (tmp_path / "c.csv").read_text().splitlines()[0].startswith("epsilon,seeds,accuracy")


def test_what_cannot_be_compared_is_named(folders, tmp_path):
    with pytest.raises(UsageError, match="no runs"):
        fv.compare([])
    with pytest.raises(UsageError, match="holds no run"):
        fv.compare([tmp_path])
    done = CliRunner().invoke(cli.build(), ["compare", str(folders[0]), "--metric", "f1", "--out", str(tmp_path / "x")])
    assert isinstance(done.exception, UsageError)
    assert "metric 'f1'" in str(done.exception)
    assert not (tmp_path / "x").exists()
