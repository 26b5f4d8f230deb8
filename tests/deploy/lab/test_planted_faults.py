"""The conformance suite against this program: honest through both sums, and with each fault of the bench planted."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedveil.common import canonical
from fedveil.common.errors import RunAborted, UsageError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import MetricSpec
from fedveil.deploy.lab.audit.canaries import one_run
from fedveil.deploy.lab.audit.examination import conformance
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.deploy.lab.audit.reference import Autograd
from fedveil.privacy.audit import consistency
from fedveil.privacy.audit.evidence import ALPHA, Examined
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


RARE = replace(bench.QUICK, alpha=1e-9)  # of each check: a right program fails here once in 10^7 runs of this file
LATE = {  # these faults have quicker tests too: in test_release_paths.py, tests/stat and tests/privacy/audit
    "noise key of 16 bits", "statistics without noise", "clients' updates without noise",
    "no noise where only sites read", "something added to the sum",
}  # fmt: skip


def train_plan(**changes):
    given = {
        "sites": 5, "records": 1000, "noise_multiplier": 1.0, "steps": 20, "clip": 0.5, "sample_rate": 0.25,
        "model": ModelSpec(name="logistic", inputs=8, classes=2), "optimizer": Optimizer(learning_rate=0.1),
        "contract_hash": "c" * 64,
    }  # fmt: skip
    return make_plan(**{**given, **changes})


@pytest.mark.parametrize("sum_", ["keysum", "plain", pytest.param("sharedkey", marks=pytest.mark.slow)])
def test_the_honest_program_passes_every_check(sum_):
    result = conformance(train_plan(sum=sum_), RARE, "closed")
    assert result.failed == ()
    assert len(result.findings) == 31
    assert result.low < result.measured < result.high
    assert result.measured == pytest.approx(1.0, abs=0.03)
    assert canonical.loads(canonical.dumps(result.to_json()))["passed"] is True
    assert result.examined == Examined("train", "distributed", sum_, "server", 0, "logistic", 18, "closed", "float32")
    consistency.conformance(at_the_usual_level(result), train_plan(sum=sum_))


def at_the_usual_level(result):
    """The same measurements, as an examination at the level of the command says them."""
    return replace(result, findings=tuple(replace(f, alpha=ALPHA) for f in result.findings))


CNN = ModelSpec(name="cnn", inputs=64, classes=3, hidden=(3, 4))
TOKENS = ModelSpec(name="lstm", inputs=6, classes=3, hidden=(20, 5, 6))


@pytest.mark.parametrize(
    ("changes", "engine", "precision"),
    [
        ({"mode": "local", "sum": "none", "sites": 3, "sample_rate": 0.5, "model": CNN}, "auto", "float32"),
        ({"sites": 3, "colluders": 0, "dropouts": 0, "sample_rate": 1.0, "noise_multiplier": 8.0, "sum": "plain"},
         "numpy", "float64"),
        pytest.param({"sites": 20, "clip": 30.0, "noise_multiplier": 0.5, "sum": "plain"}, "closed", "float64",
                     marks=pytest.mark.slow),
        pytest.param({"mode": "client", "few_clients": True, "local_steps": 4, "model": CNN}, "auto", "float64",
                     marks=pytest.mark.slow),
        pytest.param({"reveal_to": "sites", "model": TOKENS}, "vmap", "float64", marks=pytest.mark.slow),
        pytest.param({"committee": 5, "committee_seed": "ab" * 32, "model": CNN}, "book", "float64",
                     marks=pytest.mark.slow),
    ],
    ids=["local, cnn in single precision", "nobody colludes, q 1", "twenty sites, long clip", "whole clients",
         "only sites read, lstm", "committee"],
)  # fmt: skip
def test_other_honest_plans_pass_on_their_own_path(changes, engine, precision):
    plan = train_plan(**changes)
    result = conformance(plan, RARE, engine, precision)
    assert result.failed == ()
    drawn = "sampling: rate" in [f.name for f in result.findings]
    assert drawn == (plan.sample_rate < 1)
    assert result.examined is not None
    assert (result.examined.network, result.examined.engine) == (plan.model.name, engine)
    consistency.conformance(at_the_usual_level(result), plan)


@pytest.mark.slow
@pytest.mark.parametrize("metric", [False, True], ids=["columns", "columns and a model's accuracy"])
def test_an_honest_run_of_statistics_passes_on_its_own_path(metric):
    network = ModelSpec(name="mlp", inputs=3, classes=2, hidden=(4,))
    model = bench.statistics().model.model_copy(
        update={"metric": MetricSpec(network=network, model_hash="0" * 64, confusion=True) if metric else None}
    )
    plan = train_plan(model=model, clip=model.norm_bound, steps=1, sample_rate=1.0)
    result = conformance(plan, RARE)
    assert result.failed == ()
    consistency.conformance(at_the_usual_level(result), plan)


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow) if f in LATE else f for f in bench.FAULTS])
def test_each_planted_fault_fails_its_check(fault):
    assert bench.FAULTS[fault].check in bench.run(fault).failed


def test_noise_dropped_under_encryption_is_not_seen_without_it():
    # 30 checks at 1e-5: a right program fails two examinations in a row with less than 1e-7.
    assert any(bench.run("noise dropped under the secure sum", sum="plain").passed for _ in range(2))


def test_one_missing_share_leaves_more_noise_than_claimed_and_is_found_all_the_same():
    result = bench.run("one share of noise missing")
    finding = next(f for f in result.findings if f.name == "noise: variance")
    # 4 of 5 shares are there, and 3 are claimed: a test for too little noise at h shares would have passed
    assert (5 / 3) * result.measured**2 > 1.2
    assert result.high < result.claimed
    assert finding.p_value < finding.alpha


def test_an_implementation_that_releases_too_few_sums_is_no_finding_but_an_error():
    class Short:
        seats = InProcess().seats

        def run(self, plan, parts, *, absent, cap=None):
            whole = InProcess().run(plan, parts, absent=absent, cap=cap)
            return type(whole)(whole.releases[:-1], whole.status, whole.charges)

    with pytest.raises(RunAborted, match="11 of 12"):
        examine(Short(), train_plan(sum="plain"), reference=Autograd())


def test_what_cannot_be_examined_is_refused():
    with pytest.raises(UsageError, match="two rounds"):
        Effort(rounds=1)
    with pytest.raises(UsageError, match="alpha"):
        Effort(alpha=0.5)
    with pytest.raises(UsageError, match="single"):
        conformance(train_plan(), precision="single")
    with pytest.raises(RunAborted, match="unknown engine"):
        conformance(train_plan(), RARE, "fastest")
    whole_clients = train_plan(mode="client", sum="plain", few_clients=True, sample_rate=1.0)
    with pytest.raises(UsageError, match="whole clients"):
        one_run(whole_clients)
