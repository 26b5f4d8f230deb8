"""The conformance suite against this program: honest through both sums, and with each fault of the bench planted."""

import importlib.util
import sys
from pathlib import Path

import pytest

from fedveil.common import canonical
from fedveil.common.errors import RunAborted, UsageError
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.privacy.audit.suite import Effort, examine
from fedveil.privacy.plan import Optimizer, make_plan


def _bench():
    path = Path(__file__).parents[2] / "bench" / "audit_table.py"
    spec = importlib.util.spec_from_file_location("audit_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = _bench()


RARE = Effort(alpha=1e-9)  # of each of the 18 checks: a right program fails here once in 10^7 runs of this file


def train_plan(**changes):
    given = {
        "sites": 5, "records": 1000, "noise_multiplier": 1.0, "steps": 20, "clip": 0.5, "sample_rate": 0.25,
        "model": ModelSpec(name="logistic", inputs=8, classes=2), "optimizer": Optimizer(learning_rate=0.1),
        "contract_hash": "c" * 64,
    }  # fmt: skip
    return make_plan(**{**given, **changes})


@pytest.mark.parametrize("sum_", ["keysum", "plain", pytest.param("sharedkey", marks=pytest.mark.slow)])
def test_the_honest_program_passes_every_check(sum_):
    result = examine(InProcess(), train_plan(sum=sum_), RARE)
    assert result.failed == ()
    assert len(result.findings) == 18
    assert result.low < result.measured < result.high
    assert result.measured == pytest.approx(1.0, abs=0.03)
    assert canonical.loads(canonical.dumps(result.to_json()))["passed"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "local", "sum": "none", "sites": 3, "sample_rate": 0.5},
        {"sites": 3, "colluders": 0, "dropouts": 0, "sample_rate": 1.0, "noise_multiplier": 8.0, "sum": "plain"},
        pytest.param({"sites": 20, "clip": 30.0, "noise_multiplier": 0.5, "sum": "plain"}, marks=pytest.mark.slow),
    ],
    ids=["local", "nobody colludes, q 1", "twenty sites, long clip"],
)
def test_other_honest_plans_pass(changes):
    result = examine(InProcess(), train_plan(**changes), RARE)
    assert result.failed == ()
    assert ("sampling: rate" in [f.name for f in result.findings]) == (changes.get("sample_rate") != 1.0)


@pytest.mark.parametrize("fault", bench.FAULTS)
def test_each_planted_fault_fails_its_check(fault):
    # the fault of the secure sum shows only under encryption: there the plain sum would be honest
    sum_ = "keysum" if "secure sum" in fault else "plain"
    assert bench.FAULTS[fault][1] in bench.run(fault, sum_).failed


def test_noise_dropped_under_encryption_is_not_seen_without_it():
    # 18 checks at 1e-5: a right program fails two examinations in a row with less than 4e-8.
    assert any(bench.run("noise dropped under the secure sum", "plain").passed for _ in range(2))


def test_one_missing_share_leaves_more_noise_than_claimed_and_is_found_all_the_same():
    result = bench.run("one share of noise missing", "plain")
    finding = next(f for f in result.findings if f.name == "noise: variance")
    # 4 of 5 shares are there, and 3 are claimed: a test for too little noise at h shares would have passed
    assert (5 / 3) * result.measured**2 > 1.2
    assert result.high < result.claimed
    assert finding.p_value < finding.alpha


def test_an_implementation_that_releases_too_few_sums_is_no_finding_but_an_error():
    class Short:
        def run(self, plan, parts, *, absent, cap=None):
            whole = InProcess().run(plan, parts, absent=absent, cap=cap)
            return type(whole)(whole.releases[:-1], whole.status, whole.charges)

    with pytest.raises(RunAborted, match="11 of 12"):
        examine(Short(), train_plan(sum="plain"))


def test_what_cannot_be_examined_is_refused():
    with pytest.raises(UsageError, match="two rounds"):
        Effort(rounds=1)
    with pytest.raises(UsageError, match="alpha"):
        Effort(alpha=0.5)
    whole_clients = train_plan(mode="client", sum="plain", sites=1000, records=1000, sample_rate=1.0, local_steps=5)
    with pytest.raises(UsageError, match="whole clients"):
        examine(InProcess(), whole_clients)
