"""A federation.toml is rehearsed with one command; a researcher's file is simulated with one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedveil.common import cli
from fedveil.common.errors import DataError, UsageError
from fedveil.deploy.lab.choices import NETWORKS
from fedveil.privacy.report.verify import verify_report

EXAMPLE = Path(__file__).parents[3] / "examples" / "persons"


def simulate(*arguments: object) -> str:
    done = CliRunner().invoke(cli.build(), ["simulate", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def federation(tmp_path):
    folder = tmp_path / "persons"
    shutil.copytree(EXAMPLE, folder)
    settings = folder / "federation.toml"
    settings.write_text(settings.read_text().replace("steps = 40", "steps = 2"))
    return settings


def test_a_federation_is_rehearsed_with_its_own_plan_over_a_table(federation, tmp_path):
    simulate(
        "--federation", federation, "--dataset", federation.parent / "visits.csv", "--clients", 4, "--out",
        tmp_path / "run",
    )  # fmt: skip
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["unit"], plan["steps"], plan["sum"], plan["sites"]) == ("person", 2, "keysum", 4)
    assert (plan["sample_rate"], plan["clip"], plan["records"]) == (0.1, 1.0, 4000)
    said = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (said["dataset"], said["epsilon"], said["learning_rate"]) == ("visits.csv", 4.0, 0.5)
    assert verify_report(tmp_path / "run" / "report.json").ok


def test_a_federations_own_public_table_will_do(federation, tmp_path):
    text = federation.read_text().replace("[privacy]", 'public_test = "visits.csv"\n\n[privacy]')
    federation.write_text(text.replace('[model]\nname = "logistic"', '[model]\nname = "mlp"\nhidden = [3]'))
    simulate("--federation", federation, "--clients", 4, "--by", "quantity:0.5", "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["model"]["name"] == "mlp"


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        (("--clients", 4), UsageError, "needs records"),
        (("--clients", 4, "--dataset", "visits.csv", "--by", "column:ward"), UsageError, "by a column"),
        (("--clients", 4, "--dataset", "other.csv"), DataError, "other.csv"),
    ],
)
def test_what_cannot_be_rehearsed_is_named(federation, tmp_path, monkeypatch, more, error, said):
    monkeypatch.chdir(federation.parent)
    with pytest.raises(error, match=said):
        simulate("--federation", federation, "--out", tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_a_file_is_simulated_with_what_is_proposed_for_it(tmp_path):
    lines = [f"{i % 60 + 20},{'abc'[i % 3]},{'no' if i % 60 < 30 else 'yes'}" for i in range(240)]
    (tmp_path / "t.csv").write_text("age,ward,ill\n" + "\n".join(lines) + "\n")
    simulate(
        "--dataset", tmp_path / "t.csv", "--target", "ill", "--by", "column:ward", "--sum", "plain", "--epsilon", 8,
        "--network", "mlp", "--hidden", "5", "--learning-rate", 0.5, "--momentum", 0, "--clip", 0.7, "--steps", 3,
        "--out", tmp_path / "run",
    )  # fmt: skip
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["sites"], plan["model"]["hidden"], plan["clip"], plan["steps"]) == (3, [5], 0.7, 3)
    assert (plan["optimizer"]["learning_rate"], plan["optimizer"]["momentum"]) == (0.5, 0.0)
    with pytest.raises(UsageError, match="no sizes"):
        simulate("--hidden", "a,b")
    with pytest.raises(UsageError, match="which column"):
        simulate("--dataset", tmp_path / "t.csv")


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_can_be_named_in_a_federation(federation, network):
    from fedveil.common import settings as tomls

    federation.write_text(federation.read_text().replace('name = "logistic"', f'name = "{network}"'))
    assert tomls.load(federation, tomls.Federation).model.name == network
