"""Results beside a run: what is written is read back, and what was changed by hand is refused."""

import copy
import hashlib
from dataclasses import replace

import pytest

from fedveil.common import canonical, identity
from fedveil.common.errors import UsageError, VerificationError
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.audit.attach import AUDIT, LIMIT, attach, parse, plan_of, read
from fedveil.privacy.audit.evidence import Conformance, Examined, Finding
from fedveil.privacy.audit.one_run import Guesses, OneRun
from fedveil.privacy.plan import Optimizer, make_plan

PLAN = make_plan(
    sites=4, records=100, noise_multiplier=1.0, steps=3, clip=1.0,
    model=ModelSpec(name="logistic", inputs=2, classes=2),
    optimizer=Optimizer(learning_rate=0.1), contract_hash="c" * 64,
)  # fmt: skip
FINDING = Finding("noise: variance", "variance", 0.4, 1e-5, 1.01, 1.0, 500, "noise x0.9", (0.98, 1.03))
PATH = Examined.of(PLAN, "auto", "float64")
CONFORMANCE = Conformance(PLAN.hash, "keysum", 1.0, 1.01, 0.98, 1.03, 0.95, 500, (FINDING,), PATH)
ONE_RUN = OneRun(0.7, 0.95, 1e-5, "f-dp", Guesses(1000, 100, 60), 4.0, 0.4)
OLD = replace(CONFORMANCE, examined=None), replace(ONE_RUN, detects=None)  # as the first suite wrote them


@pytest.fixture
def run(tmp_path):
    (tmp_path / "plan.json").write_bytes(canonical.dumps(PLAN.to_json()))
    return tmp_path


def test_both_results_are_kept_side_by_side(run):
    assert read(run, PLAN.hash) is None
    path = attach(run, CONFORMANCE)
    attach(run, ONE_RUN)
    held = read(run, PLAN.hash)
    assert held is not None
    assert (held.conformance, held.one_run) == (CONFORMANCE, ONE_RUN)
    assert canonical.dumps(held.to_json()) + b"\n" == path.read_bytes()
    assert not list(run.glob(".*"))


KEY, OTHER = identity.new_signing_key(), identity.new_signing_key()
PUBLIC = hashlib.sha256(KEY.public_key().public_bytes_raw()).hexdigest()


def test_an_auditor_signs_each_result_with_a_key_of_its_own(run):
    attach(run, CONFORMANCE, KEY)
    attach(run, ONE_RUN)
    held = read(run, PLAN.hash)
    assert held is not None
    assert held.auditors == {"conformance": PUBLIC, "one_run": ""}
    attach(run, ONE_RUN, OTHER)  # another auditor's; the first one's signature stays
    held = read(run, PLAN.hash)
    assert held is not None
    assert held.auditors["conformance"] == PUBLIC
    assert len({*held.auditors.values(), ""}) == 3
    attach(run, CONFORMANCE)  # a new result does not keep an old one's signature
    held = read(run, PLAN.hash)
    assert held is not None
    assert held.auditors["conformance"] == ""
    assert held.auditors["one_run"]


def test_results_of_the_first_suite_are_still_read_and_are_unsigned(run):
    body = {"v": 1, "plan_hash": PLAN.hash, "conformance": OLD[0].to_json(), "one_run": OLD[1].to_json()}
    assert "examined" not in body["conformance"]
    assert "detects_noise_factor" not in body["one_run"]
    held = parse(canonical.dumps(body), PLAN.hash)
    assert (held.conformance, held.one_run) == OLD
    assert held.auditors == {"conformance": "", "one_run": ""}


def test_a_signature_is_under_one_result_of_one_plan(run):
    """What a signature is moved to, or what is changed beneath it, is refused."""
    attach(run, CONFORMANCE, KEY)
    attach(run, ONE_RUN, KEY)
    body = canonical.loads((run / AUDIT).read_bytes())
    s = body["signatures"]
    for lie in (
        {"signatures": {"conformance": s["one_run"]}},
        {"signatures": {**s, "one_run": {**s["one_run"], "signer": identity.public_hex(OTHER)}}},
        {"signatures": {**s, "one_run": {**s["one_run"], "signature": "0" * 128}}},
        {"signatures": {**s, "one_run": {**s["one_run"], "signature": s["one_run"]["signature"].upper()}}},
        {"signatures": {**s, "one_run": {**s["one_run"], "more": 1}}},
        {"signatures": {**s, "one_run": {"signer": "f" * 64, "signature": "f" * 128}}},
        {"signatures": {**s, "another": s["one_run"]}},
        {"signatures": {}},
        {"signatures": None},
        {"signatures": [s]},
        {"one_run": replace(ONE_RUN, bound=0.6).to_json()},
    ):
        with pytest.raises(VerificationError):
            parse(canonical.dumps({**body, **lie}), PLAN.hash)
    del body["one_run"]
    with pytest.raises(VerificationError, match="not there"):
        parse(canonical.dumps(body), PLAN.hash)
    other = make_plan(
        sites=4, records=100, noise_multiplier=2.0, steps=3, clip=1.0, model=PLAN.model,
        optimizer=Optimizer(learning_rate=0.1), contract_hash="c" * 64,
    )  # fmt: skip
    moved = {**body, "plan_hash": other.hash, "conformance": {**body["conformance"], "plan_hash": other.hash}}
    del moved["signatures"]["one_run"]
    with pytest.raises(VerificationError, match="does not hold"):
        parse(canonical.dumps(moved), other.hash)


def test_sentences():
    assert CONFORMANCE.sentence == "measured noise multiplier 1.01 [0.98, 1.03] against claimed 1"
    assert ONE_RUN.sentence == "no evidence above ε ≥ 0.7 (confidence 95%, δ = 1e-05) against claimed 4"
    assert CONFORMANCE.passed
    failed = Conformance(PLAN.hash, "keysum", 1.0, 0.5, 0.4, 0.6, 0.95, 500, (FINDING, _p(1e-9)))
    assert not failed.passed
    assert failed.failed == ("noise: variance",)


def _p(value):
    return Finding(**{**FINDING.__dict__, "p_value": value})


def test_another_plans_results_are_refused(run):
    other = Conformance("0" * 64, *list(CONFORMANCE.__dict__.values())[1:])
    with pytest.raises(VerificationError, match="another plan"):
        attach(run, other)
    attach(run, CONFORMANCE)
    with pytest.raises(VerificationError, match="another plan"):
        read(run, "0" * 64)


def edit(body, path, value):
    out = copy.deepcopy(body)
    at = out
    for step in path[:-1]:
        at = at[step]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return canonical.dumps(out)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("v",), 2), (("v",), True), (("v",), KeyError), (("more",), 1), (("plan_hash",), 7),
        (("conformance",), []), (("conformance", "passed"), False), (("conformance", "sentence"), "all is well"),
        (("conformance", "failed"), ["x"]), (("conformance", "measured_noise_multiplier"), 2.0),
        (("conformance", "measured_noise_multiplier"), "1"), (("conformance", "interval"), [1.0]),
        (("conformance", "findings"), []), (("conformance", "findings"), [{}] * 65),
        (("conformance", "findings", 0, "p_value"), 1e-9), (("conformance", "findings", 0, "p_value"), 1.5),
        (("conformance", "findings", 0, "name"), "a\u0000b"), (("conformance", "findings", 0, "asks"), "x" * 600),
        (("one_run", "right"), 101), (("one_run", "method"), "guess"), (("one_run", "passed"), False),
        (("one_run", "epsilon_lower_bound"), 5.0), (("one_run", "epsilon_lower_bound"), -1.0),
        (("one_run", "confidence"), 1.5), (("one_run", "extra"), 1), (("one_run", "detects_noise_factor"), 2.0),
        (("conformance", "examined"), {}), (("conformance", "examined", "parameters"), "9"),
        (("conformance", "examined", "engine"), "x" * 33), (("conformance", "examined", "more"), 1),
    ],
)  # fmt: skip
def test_what_was_changed_by_hand_is_refused(run, path, value):
    attach(run, CONFORMANCE)
    attach(run, ONE_RUN)
    body = canonical.loads((run / AUDIT).read_bytes())
    parse(canonical.dumps(body), PLAN.hash)
    with pytest.raises(VerificationError):
        parse(edit(body, path, value), PLAN.hash)


def test_files_that_are_none(run):
    for data in (b"", b"[]", b"{", b"\xff"):
        with pytest.raises(VerificationError):
            parse(data, PLAN.hash)
    (run / AUDIT).write_bytes(b" " * (LIMIT + 1))
    with pytest.raises(VerificationError, match="at most"):
        read(run, PLAN.hash)
    (run / "none.json").write_bytes(b"{")
    for nothing in ("nowhere", "none.json"):
        with pytest.raises(UsageError, match="no plan"):
            plan_of(run / nothing)
    assert plan_of(run).hash == plan_of(run / "plan.json").hash == PLAN.hash
