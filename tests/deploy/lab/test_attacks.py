"""The attacks do what they are said to, and the noise stops them; the one-run audit through the real path."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fedveil.common import identity
from fedveil.common.cli import build
from fedveil.common.errors import IdentityError, UsageError, VerificationError
from fedveil.common.journal import Journal
from fedveil.common.units import SiteId
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build as network
from fedveil.common.workload.torch.networks import flatten
from fedveil.deploy.lab.attacks import inversion, membership, views
from fedveil.deploy.lab.attacks import table as attacks
from fedveil.deploy.lab.audit.canaries import Setting, one_run
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.privacy.audit.evidence import Release, Run
from fedveil.privacy.plan import Optimizer, make_plan

SPEC = ModelSpec(name="mlp", inputs=64, classes=10, hidden=(32,), seed=7)


def images(n, seed=0):
    """Sparse records in [0, 1]: like digits, not scikit-learn's."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(0.3, 0.5, (n, 64)), 0, 1).astype(np.float32)


def test_a_single_record_is_read_off_its_gradient():
    weights = flatten(network(SPEC))
    X, y = images(8), np.arange(8)
    for i in range(8):
        seen = views.gradient(SPEC, weights, (X[i : i + 1], y[i : i + 1]))
        assert np.abs(inversion.best(SPEC, seen) - X[i]).max() < 1e-6
        assert inversion.errors(inversion.candidates(SPEC, seen), X[i : i + 1]).max() < 1e-12
        assert inversion.label(SPEC, seen) == y[i]
    matched = inversion.idlg(SPEC, views.gradient(SPEC, weights, (X[:1], y[:1])))
    assert np.abs(matched - X[0]).max() < 0.01


def test_the_imprint_takes_a_sum_over_all_sites_apart_and_noise_stops_it():
    spec = ModelSpec(name="mlp", inputs=64, classes=10, hidden=(256,), seed=7)
    weights = inversion.imprint(spec, images(400, 1))
    X, y = images(40, 2), np.arange(40) % 10
    parts = [(X[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
    exact = inversion.errors(inversion.candidates(spec, views.exact_sum(spec, weights, parts)), X)
    assert (exact < inversion.EXACT).mean() > 0.7
    public = flatten(network(spec))  # without the trap a sum over forty records hides them
    assert not (inversion.errors(inversion.candidates(spec, views.exact_sum(spec, public, parts)), X) < 1e-3).any()
    plan = views.one_step_plan(spec, 5, 40, 8.0)
    noisy = inversion.errors(inversion.candidates(spec, views.opened(plan, weights, parts)), X)
    assert not (noisy < inversion.EXACT).any()


def test_lira_finds_what_moves_and_nothing_where_nothing_moves():
    rng = np.random.default_rng(4)
    member = membership.halves(16, 200)
    assert (member.sum(0) == 8).all()
    noise = rng.standard_normal(member.shape)
    strong = membership.judge(*membership.lira(noise + 8.0 * member, member), 1.0)
    none = membership.judge(*membership.lira(noise, member), 1.0)
    assert strong.rate > 0.9
    assert strong.auc > 0.99
    assert none.rate < 0.03
    assert none.auc == pytest.approx(0.5, abs=0.05)


def test_the_whole_report_of_attacks(tmp_path):
    result = attacks.run_all(attacks.Scale(records=3, shown=3, batch=3, models=4, members=40, steps=6))
    by = {(r.attack.split()[0].strip(","), r.defence): r.exact / r.of for r in result.rows}
    for attack in ("division", "matching", "imprint"):
        assert by[attack, "none"] == 1
        assert by[attack, "secure sum with DP"] == 0
    assert result.bounds["none"] == 1
    assert 0.01 < result.bounds["DP, ε = 1"] < 0.03 < result.bounds["DP, ε = 8"] < 0.5
    attacks.write(result, tmp_path)
    assert (tmp_path / "attacks.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "attacks.json").read_text())["v"] == 1
    assert "| division, one record per site | none | 100% (3 of 3)" in (tmp_path / "attacks.md").read_text()


def small(**changes):
    given = {
        "sites": 3, "colluders": 1, "dropouts": 0, "records": 300, "noise_multiplier": 2.0, "steps": 6, "clip": 0.5,
        "model": ModelSpec(name="logistic", inputs=4, classes=2), "optimizer": Optimizer(learning_rate=0.1),
        "contract_hash": "c" * 64, "sum": "plain",
    }  # fmt: skip
    return make_plan(**{**given, **changes})


def test_one_run_through_the_real_path_stays_below_the_claim():
    whole = one_run(small(), Setting(canaries=400))  # bounds of 1.7 ± 0.35 are found, and 5.5 is claimed
    assert whole.method == "gaussian"
    assert 0 < whole.bound <= whole.claimed
    sampled = one_run(small(sample_rate=0.5), Setting(canaries=100, steps=2, confidence=1 - 1e-9))
    assert sampled.method == "f-dp"
    assert sampled.passed


def test_one_run_sees_that_the_noise_is_not_there():
    class Silent:
        """Opens the sums without their noise."""

        seats = InProcess().seats

        def run(self, plan, parts, *, absent, cap=None):
            out = InProcess().run(plan, parts, absent=absent, cap=cap)
            X = np.concatenate([p[0] for p in parts])
            clean = np.zeros((2, plan.model.inputs))
            clean[1] = (X > 0).sum(0) * plan.clip / 2**0.5
            clean[0] = -clean[1]
            values = np.concatenate([clean.reshape(-1), [0.0, 0.0]])
            return Run(tuple(Release(r.members, values, r.applied) for r in out.releases), out.status, out.charges)

    result = one_run(small(noise_multiplier=8.0), Setting(canaries=400), implementation=Silent())
    assert result.bound > result.claimed
    assert not result.passed


def test_too_few_canaries_are_refused():
    with pytest.raises(UsageError, match="canaries"):
        Setting(canaries=9)


def test_the_commands_and_the_file_beside_the_run(tmp_path):
    from fedveil.common import canonical
    from fedveil.privacy.audit.attach import read

    plan = small()
    (tmp_path / "plan.json").write_bytes(canonical.dumps(plan.to_json()))
    runner = CliRunner()

    def conformance(*words):
        """Its checks fail a right program with 18e-5: a second, independent examination decides, so with 4e-8."""
        command = ["audit", "conformance", str(tmp_path), "--rounds", "4", *words]
        first = runner.invoke(build(), command)
        return first if first.exit_code == 0 else runner.invoke(build(), command)

    shown = conformance("--inputs", "256")
    assert shown.exit_code == 0, shown.output
    assert not (tmp_path / "audit.json").exists()
    (tmp_path / "report.json").touch()
    key = identity.new_signing_key()
    identity.save_signing_key(tmp_path / "auditor.key", key)
    signer = ("--auditor-key", str(tmp_path / "auditor.key"))
    kept = conformance("--inputs", "64", *signer, "--attach")
    assert kept.exit_code == 0, kept.output
    assert "out of date" in kept.output
    assert "against claimed 2" in shown.output
    bound = runner.invoke(build(), ["audit", "one-run", str(tmp_path), "--canaries", "50", "--json", "--attach"])
    assert bound.exit_code == 0, bound.output
    held = read(tmp_path, plan.hash)
    assert held is not None
    assert held.conformance is not None
    assert held.one_run is not None
    assert held.one_run.guesses.canaries == 50
    assert canonical.loads(bound.stdout)["one_run"] == held.one_run.to_json()
    assert held.one_run.detects is not None
    assert held.signatures["conformance"].signer == identity.public_hex(key)
    assert held.auditors["one_run"] == ""
    said = runner.invoke(build(), ["audit", "one-run", str(tmp_path), "--canaries", "50", *signer, "--json"])
    assert canonical.loads(said.stdout)["signatures"]["one_run"]["signer"] == identity.public_hex(key)
    said = runner.invoke(build(), ["audit", "one-run", str(tmp_path), "--canaries", "50"])
    assert "smallest fault this audit finds: " in said.output
    (tmp_path / "auditor.key").chmod(0o640)
    refused = runner.invoke(build(), ["audit", "one-run", str(tmp_path), *signer])
    assert isinstance(refused.exception, IdentityError)
    assert "openssl genpkey -algorithm ed25519" in refused.exception.hint


def test_the_precision_is_the_one_that_the_runs_ledgers_note(tmp_path):
    from fedveil.deploy.cli.audit_evidence import _noted_precision

    assert _noted_precision(None) == _noted_precision(tmp_path) == "float32"
    for site, noted in (("a", {}), ("b", {"precision": "float32"})):
        path = tmp_path / "journals" / f"{site}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with Journal.open(path, SiteId(site), identity.new_signing_key(), durable=False) as journal:
            journal.append("plan.accepted", noted)
        assert _noted_precision(tmp_path) == noted.get("precision", "float64")


@pytest.mark.parametrize("more", [["--attach"], ["RUN", "--attach", "--steps", "2"], ["RUN/nothing"]])
def test_what_cannot_be_attached_is_refused(tmp_path, more):
    (tmp_path / "plan.json").write_text(json.dumps(small().to_json()))
    words = [w.replace("RUN", str(tmp_path)) for w in more]
    done = CliRunner().invoke(build(), ["audit", "one-run", *words, "--canaries", "20"])
    assert isinstance(done.exception, UsageError)
    assert not (tmp_path / "audit.json").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_the_attacks(tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(build(), ["audit", "attacks", "--out", str(tmp_path / "file" / "x")])
    assert isinstance(done.exception, UsageError)


def test_a_failed_examination_ends_with_the_code_of_verification(tmp_path, monkeypatch):
    from fedveil.client import round as line

    monkeypatch.setattr(line, "discrete_gaussian", lambda std, size: np.zeros(size, np.int64))
    (tmp_path / "plan.json").write_text(json.dumps(small().to_json()))
    done = CliRunner().invoke(build(), ["audit", "conformance", str(tmp_path), "--rounds", "4", "--inputs", "64"])
    assert isinstance(done.exception, VerificationError)
    assert "noise: variance" in str(done.exception)
