"""``fedveil plan``: settings and contract in, the plan and its price out; nothing runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedveil.common import canonical, identity
from fedveil.common import settings as tomls
from fedveil.common.contract import DataContract, sign_contract
from fedveil.common.errors import ConfigError, ContractError, PlanError, UsageError, VerificationError
from fedveil.common.identity import Member, Roster
from fedveil.common.units import Delta, Epsilon, SiteId
from fedveil.deploy.cli.plan import plan
from fedveil.privacy import plan as plans
from fedveil.privacy.dp.accounting import Filter, best_order, gaussian_epsilon
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.planning import forecast, plan_from_settings, values_per_coefficient

CONTRACT = """
name = "heart"
version = "1"
purpose = "research"
unit = "one patient"
k = 2
columns = [
  { name = "age", role = "quasi", type = "number", low = 18, high = 80, levels = [50] },
  { name = "pressure", role = "feature", type = "number", low = 60, high = 250 },
  { name = "ill", role = "target", type = "category", values = ["no", "yes"] },
]
"""
FEDERATION = """
[federation]
name = "hearts"
address = "localhost:9000"
identity = "server"
contract = "{contract}"
[privacy]
epsilon = {epsilon}
records = 2000
steps = 30
clip = 1.0
{more}
[model]
name = "logistic"
[optimizer]
learning_rate = 0.5
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    consortium = identity.new_signing_key()
    members = [Member(SiteId(f"s{i}"), identity.public_hex(identity.new_signing_key())) for i in range(5)]
    server = Member(identity.SERVER, identity.public_hex(identity.new_signing_key()))
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "consortium.pub").write_text(identity.public_hex(consortium) + "\n")
    roster = identity.sign_roster(Roster("hearts", server, tuple(members)), consortium)
    (tmp_path / "server" / "roster.json").write_bytes(canonical.dumps(roster))
    (tmp_path / "contract.toml").write_text(CONTRACT)
    signed = sign_contract(DataContract.load(tmp_path / "contract.toml"), consortium)
    (tmp_path / "contract.json").write_bytes(canonical.dumps(signed))
    return tmp_path


def settings(folder: Path, *, contract: str = "contract.json", epsilon: float = 2.0, more: str = "") -> Path:
    path = folder / "federation.toml"
    path.write_text(FEDERATION.format(contract=contract, epsilon=epsilon, more=more))
    return path


def call(*arguments: object):
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


def test_the_plan_comes_from_settings_contract_and_roster(folder) -> None:
    path = settings(folder)
    found = canonical.loads(call(path, "--json").stdout)
    made = plans.from_json(found["plan"])
    contract = DataContract.load(folder / "contract.toml")
    assert made == plan_from_settings(tomls.load(path, tomls.Federation), contract, 5)
    assert (made.sites, made.colluders, made.dropouts) == (5, 1, 1)
    assert (made.model.inputs, made.model.classes) == (contract.width, contract.classes) == (3, 2)
    assert made.contract_hash == contract.hash
    assert found["plan_hash"] == made.hash
    exact = gaussian_epsilon(math.sqrt(30) / made.noise_multiplier, 1e-5)
    assert exact <= found["epsilon_pld"] <= 2.0
    assert found["epsilon_pld"] < found["epsilon_rdp"]
    assert found["fallback_epsilon"] == pytest.approx(
        gaussian_epsilon(math.sqrt(30 * made.honest) / made.noise_multiplier, 1e-5), abs=3e-3
    )


def test_the_cap_it_names_carries_the_run_and_a_little_less_does_not(folder) -> None:
    cap = canonical.loads(call(settings(folder), "--json").stdout)["filter_epsilon"]
    at = lambda c: canonical.loads(call(settings(folder), "--json", "--cap", repr(c)).stdout)["affordable_steps"]  # noqa: E731
    assert at(cap) == 30
    assert at(0.99 * cap) < 30


def test_the_forecast_is_arithmetic(folder) -> None:
    path = settings(folder)
    p = plan_from_settings(tomls.load(path, tomls.Federation), DataContract.load(folder / "contract.toml"), 5)
    f = forecast(p, cap=4.0)
    shares = p.share_std * p.grid * math.sqrt(p.sites)
    assert f.noise_per_parameter == pytest.approx(shares / p.divisor / p.clip)
    assert f.noise_to_signal == pytest.approx(f.noise_per_parameter * math.sqrt(p.model.parameters))
    assert f.affordable == Filter(4.0, p.delta, best_order(4.0, p.delta)).affords(p.event)
    assert f.bytes_per_parameter == 7 / values_per_coefficient(p.bound)
    assert not f.warnings


@pytest.mark.parametrize(("bits", "values"), [(46, 1), (24, 1), (23, 2), (16, 2), (15, 3), (11, 4)])
def test_values_per_coefficient(bits, values) -> None:
    assert values_per_coefficient((1 << bits) // 2 - 1) == values


def test_the_table_says_it_all(folder) -> None:
    result = call(settings(folder, more='sum = "keysum"'), "--cap", "5")
    assert result.exit_code == 0, result.exception
    for words in ("σ = ", "replace one", "fallback ε", "h = 3", "T = 4", "at least 4 sites", "noise to signal",
                  "bytes per parameter", "a cap of 5", "signed", "2 classes"):  # fmt: skip
        assert words in result.stdout, words
    assert "warning" not in result.stdout


def test_epsilon_from_a_given_noise(folder) -> None:
    found = canonical.loads(call(settings(folder), "--noise-multiplier", "10", "--json").stdout)
    assert found["plan"]["noise_multiplier"] == 10.0
    assert found["plan"]["epsilon"] == found["epsilon_pld"]
    assert found["epsilon_pld"] == pytest.approx(gaussian_epsilon(math.sqrt(30) / 10, 1e-5), abs=1e-3)
    assert found["epsilon_replace_one"] == pytest.approx(gaussian_epsilon(math.sqrt(30) / 5, 1e-5), abs=1e-3)
    assert "σ = 10.0000" in call(settings(folder), "--noise-multiplier", "10").stdout
    assert isinstance(call(settings(folder), "--noise-multiplier", "0.01").exception, PlanError)


def test_what_a_ledger_that_has_spent_still_carries(folder) -> None:
    """Ten steps less than a fresh one of the same cap; a ledger of another δ is not this plan's."""
    path, key = settings(folder), identity.new_signing_key()
    p = plan_from_settings(tomls.load(path, tomls.Federation), DataContract.load(folder / "contract.toml"), 5)
    cap = forecast(p).filter_epsilon
    for name, delta in (("a", 1e-5), ("b", 1e-6)):
        ledger = Ledger.open(folder / name, "s0", key, lineage="x", cap=Epsilon(cap), delta=Delta(delta), durable=False)
        for n in range(10 if name == "a" else 0):
            ledger.reserve("before", n + 1, p.hash, p.event)
        ledger.close()
    found = canonical.loads(call(path, "--ledger", folder / "a", "--json").stdout)
    assert found["ledger_affordable_steps"] == 20
    assert 0 < found["ledger_spent"] < cap
    assert "still pays for 20 of these steps" in call(path, "--ledger", folder / "a").stdout
    assert isinstance(call(path, "--ledger", folder / "b").exception, PlanError)
    assert isinstance(call(path, "--ledger", folder / "c").exception, UsageError)
    assert isinstance(call(path, "--ledger", folder).exception, UsageError)
    assert "'fedveil ledger verify' checks the signatures" in call(path, "--ledger", folder / "a").stdout
    (folder / "a").write_bytes(b"".join((folder / "a").read_bytes().splitlines(keepends=True)[:-1][::2]))
    assert isinstance(call(path, "--ledger", folder / "a").exception, VerificationError)


def test_a_draft_and_a_number_of_sites_are_enough_to_plan_with(folder) -> None:
    for file in ("roster.json", "consortium.pub"):
        (folder / "server" / file).unlink()
    path = settings(folder, contract="contract.toml")
    result = call(path, "--sites", "8")
    assert result.exit_code == 0, result.exception
    assert "an unsigned draft" in result.stdout
    assert "n = 8" in result.stdout
    assert isinstance(call(path).exception, ConfigError)


def test_warnings(folder) -> None:
    result = call(settings(folder, epsilon=12.0, more='sum = "sharedkey"\ncolluders = 0'))
    assert result.stdout.count("warning:") == 3
    assert "more than 10" in result.stdout
    assert "one curious site" in result.stdout


@pytest.mark.parametrize(("epsilon", "nearest"), [(0.0, 0.001), (-2.0, 0.001), (1e4, 600.0)])
def test_an_impossible_budget_is_refused_with_the_nearest_possible_one(folder, epsilon, nearest) -> None:
    refused = call(settings(folder, epsilon=epsilon)).exception
    assert isinstance(refused, PlanError)
    assert refused.nearest == {"epsilon": nearest}


def test_what_cannot_hold_is_refused(folder) -> None:
    assert isinstance(call(settings(folder, more="colluders = 3")).exception, PlanError)
    assert isinstance(call(settings(folder, more="delta = 0.001")).exception, PlanError)
    assert isinstance(call(settings(folder), "--cap", "-1").exception, UsageError)
    assert isinstance(call(folder / "none.toml").exception, ConfigError)
    document = canonical.loads((folder / "contract.json").read_bytes())
    document["payload"]["contract"]["k"] = 3
    (folder / "contract.json").write_bytes(canonical.dumps(document))
    assert isinstance(call(settings(folder)).exception, ContractError)
