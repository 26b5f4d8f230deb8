"""An empirical audit's results beside a report: one parser, wherever they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from fedveil.common import canonical, identity
from fedveil.common.errors import UsageError, VerificationError
from fedveil.deploy.cli.audit import app
from fedveil.privacy.audit import attach as attach_module
from fedveil.privacy.audit import consistency, noise_checks
from fedveil.privacy.audit.attach import Evidence
from fedveil.privacy.audit.evidence import ALPHA, Conformance, Examined, Finding
from fedveil.privacy.audit.one_run import Guesses, OneRun, corrected, detectable
from fedveil.privacy.audit.slab import price
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report import results
from fedveil.privacy.report.build import build_report
from fedveil.privacy.report.verify import verify_report


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


SAMPLES = 4096


def variance(name: str, claimed: float, ratio: float = 0.99, samples: int = SAMPLES) -> Finding:
    """What an examination writes that measured ``ratio`` times the claim; the residuals are all alike."""
    z = np.full((1, samples), ratio)
    return noise_checks.variance(z, claimed, ALPHA, 0.95, 4, name)


def examination(plan: PrivacyPlan, since: bool = True, **changes: Any) -> Conformance:
    """A whole one, with every check that belongs to it; other findings by name."""
    path = Examined.of(plan, "auto", "float64") if since else None
    names = consistency.checks_of(plan, path)
    findings = {name: Finding(name, "asks", 0.4, ALPHA, 0.5, 0.5, SAMPLES, "a fault") for name in names}
    sure = {
        "neighbours: divisor": (0.0, 0.0),
        "ledger: composition": (0.0, 0.0),
        "ledger: stops at the cap": (2.0, 2.0),
        "ledger: price": (0.0, 0.0),
        "sum: nothing added or lost": (0.0, 0.0),
        "noise: key": (0.0, 0.0),
    }
    for name, (measured, expected) in ((n, v) for n, v in sure.items() if n in findings):
        findings[name] = replace(findings[name], p_value=1.0, measured=measured, expected=expected)
    findings["noise: variance"] = variance("noise: variance", plan.noise_multiplier)
    findings["noise: beside records"] = variance("noise: beside records", 0.25)
    if since:
        findings["own path: noise"] = variance("own path: noise", plan.noise_multiplier)
        findings["own path: noise beside records"] = variance("own path: noise beside records", 0.25)
        for name in ("noise: largest value", "sites: largest value", "own path: largest value"):
            findings[name] = noise_checks.largest(3.5, SAMPLES, ALPHA, name)
    p = float(stats.kstwobign.sf(0.01 * 64))  # the square root of 4096
    findings["noise: shape"] = replace(findings["noise: shape"], measured=0.01, p_value=p)
    findings |= changes
    own = findings["noise: variance"]
    low, high = own.interval or (0.0, 0.0)
    held = tuple(findings.values())
    return Conformance(plan.hash, plan.sum, plan.noise_multiplier, own.measured, low, high, 0.95, SAMPLES, held, path)


def evidence_of(w, **changes: Any) -> Evidence:
    """What an audit of the run's plan says: the noise is right, and a bound far below the claim."""
    plan = w.plan
    guesses = Guesses(1000, 100, 70)
    least = detectable(1000, price(plan), plan.steps, plan.claim, plan.delta, 0.95, "gaussian")
    bound = OneRun(
        corrected(guesses, plan.delta, 0.95, "gaussian"), 0.95, plan.delta, "gaussian", guesses, plan.claim, least
    )
    return Evidence(plan.hash, replace(examination(plan), **changes), bound)


def test_an_audits_results_enter_the_report_and_are_verified(spoilt, tmp_path) -> None:
    found, sigma = evidence_of(spoilt), spoilt.plan.noise_multiplier
    key, parts = tmp_path / "signing.key", [tmp_path / "noise.json", tmp_path / "one.json"]
    identity.save_signing_key(key, spoilt.server)
    for path, part in zip(parts, (replace(found, one_run=None), replace(found, conformance=None)), strict=True):
        path.write_bytes(canonical.dumps(part.to_json()))
    done = call("report", spoilt.folder, "--key", key, "--audit", parts[0], "--audit", parts[1])
    assert done.exit_code == 0, done.exception
    assert verify_report(spoilt.report).ok
    payload = canonical.loads(spoilt.report.read_bytes())["payload"]
    assert payload["audit"] == found.to_json()
    page = (spoilt.folder / "report.html").read_text(encoding="utf-8")
    assert found.conformance is not None
    assert found.one_run is not None
    measured, low, high = (f"{x:.4g}" for x in (0.99 * sigma, found.conformance.low, found.conformance.high))
    assert f"Measured noise multiplier {measured} [{low}, {high}] against claimed {sigma:.4g}" in page
    assert "under the plan of this run" in page
    assert found.one_run.bound > 0.1
    assert f"No evidence above ε ≥ {found.one_run.bound:.4g}" in page


def test_the_auditors_key_is_named_by_its_fingerprint_and_unsigned_results_as_such(spoilt, tmp_path) -> None:
    found, key = evidence_of(spoilt), identity.new_signing_key()
    assert found.conformance is not None
    assert found.one_run is not None
    signed = attach_module.evidence_of(spoilt.plan.hash, found.conformance, key).beside(found)
    (tmp_path / "both.json").write_bytes(canonical.dumps(signed.to_json()))
    results.attach(spoilt.folder, [tmp_path / "both.json"])
    build_report(spoilt.folder, spoilt.server)
    done = call("verify", spoilt.report)
    assert done.exit_code == 0, done.exception
    fingerprint = signed.signatures["conformance"].fingerprint
    assert len(fingerprint) == 64
    assert f"Attached audit, conformance: signed by the auditor's key with SHA-256 {fingerprint}." in done.stdout
    assert "Attached audit, one-run: unsigned." in done.stdout
    shown = canonical.loads(call("verify", spoilt.report, "--json").stdout.encode())
    assert shown["auditors"] == {"conformance": fingerprint, "one_run": ""}
    assert call("verify", spoilt.report, "--auditor", "0" * 64).exit_code != 0
    asked = call("verify", spoilt.report, "--auditor", fingerprint)
    assert "the attached audit (one-run) is unsigned" in str(asked.exception)
    assert isinstance(call("verify", spoilt.report, "--auditor", "abc").exception, UsageError)
    # another key under the same words: the file no longer holds, beside the report or without it
    body = signed.to_json()
    body["signatures"]["conformance"]["signer"] = identity.public_hex(identity.new_signing_key())
    (spoilt.folder / "audit.json").write_bytes(canonical.dumps(body))
    assert call("verify", spoilt.report).exit_code != 0
    with pytest.raises(VerificationError, match="signature of the auditor"):
        build_report(spoilt.folder, spoilt.server)


def test_results_of_the_first_suite_still_verify_unsigned(spoilt) -> None:
    """What was attached before results were signed, and looked at the slab alone."""
    found = evidence_of(spoilt)
    assert found.one_run is not None
    old = Evidence(found.plan_hash, examination(spoilt.plan, since=False), replace(found.one_run, detects=None))
    assert old.to_json().keys() == {"v", "plan_hash", "conformance", "one_run"}
    (spoilt.folder / "audit.json").write_bytes(canonical.dumps(old.to_json()))
    build_report(spoilt.folder, spoilt.server)
    verified = verify_report(spoilt.report)
    assert verified.ok
    assert verified.auditors == {"conformance": "", "one_run": ""}


AUDIT_LIES = {
    "a number that its sentence does not have": (
        lambda b: b["conformance"].update(measured_noise_multiplier=5.1),
        "follow",
    ),
    "a verdict": (lambda b: b["conformance"].update(passed=False), "follow"),
    "a sentence": (lambda b: b["one_run"].update(sentence="all is well"), "follow"),
    "a field more": (lambda b: b.update(more=1), "other fields"),
    "another version": (lambda b: b.update(v=2), "follow"),
    "another plan": (lambda b: b.update(plan_hash="0" * 64), "another plan"),
    "nothing": (dict.clear, "other fields"),
    "no numbers": (lambda b: b.update(one_run={}), "one_run"),
    "an interval that is none": (lambda b: b["conformance"].update(interval=5), "interval"),
}


@pytest.mark.parametrize("lie", AUDIT_LIES)
def test_an_audit_is_read_by_the_one_parser_wherever_it_is_read(spoilt, tmp_path, lie) -> None:
    """Beside a finished report, when a report is built from it, and when it is taken in."""
    change, said = AUDIT_LIES[lie]
    body = evidence_of(spoilt).to_json()
    change(body)
    path = spoilt.folder / "audit.json"
    path.write_bytes(canonical.dumps(body))
    failed = verify_report(spoilt.report).failed
    assert failed is not None
    assert said in failed.detail
    with pytest.raises(VerificationError, match=said):
        build_report(spoilt.folder, spoilt.server)
    path.unlink()
    (tmp_path / "bad.json").write_bytes(canonical.dumps(body))
    with pytest.raises(VerificationError, match=said):
        results.attach(spoilt.folder, [tmp_path / "bad.json"])
    assert not path.exists()


def test_an_audit_speaks_of_the_plans_claims(spoilt) -> None:
    held = evidence_of(spoilt)
    assert held.one_run is not None
    other = {
        "noise multiplier": evidence_of(spoilt, claimed=spoilt.plan.noise_multiplier / 2),
        "ε or δ": replace(held, one_run=replace(held.one_run, claimed=3.0)),
        "lower bound": replace(held, one_run=replace(held.one_run, delta=1e-3)),
    }
    for said, lie in other.items():
        with pytest.raises(VerificationError, match=said):
            results.held_against(canonical.dumps(lie.to_json()), spoilt.plan)
    assert results.held_against(canonical.dumps(held.to_json()), spoilt.plan) == held


def edited(w, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The evidence with a number changed by hand, its sentences and verdicts made to fit."""
    body = evidence_of(w).to_json()
    change(body)
    for part in ("conformance", "one_run"):
        for f in body[part].get("findings", []):
            f["passed"] = f["p_value"] >= f["alpha"]
    c, o = body["conformance"], body["one_run"]
    c["failed"] = [f["name"] for f in c["findings"] if not f["passed"]]
    c["passed"] = not c["failed"]
    low, high = c["interval"]
    measured, claimed = c["measured_noise_multiplier"], c["claimed_noise_multiplier"]
    c["sentence"] = f"measured noise multiplier {measured:.4g} [{low:.4g}, {high:.4g}] against claimed {claimed:.4g}"
    guesses = Guesses(o["canaries"], o["guesses"], o["right"])
    one = OneRun(
        o["epsilon_lower_bound"], o["confidence"], o["delta"], o["method"], guesses, o["claimed_epsilon"],
        o["detects_noise_factor"],
    )  # fmt: skip
    body["one_run"] = one.to_json()
    return canonical.dumps(body)


def finding(body: dict[str, Any], name: str) -> dict[str, Any]:
    return next(f for f in body["conformance"]["findings"] if f["name"] == name)


def every(body: dict[str, Any], **values: Any) -> None:
    for f in body["conformance"]["findings"]:
        f.update(values)


def all_right(body: dict[str, Any]) -> None:
    body["one_run"].update(guesses=1000, right=1000, epsilon_lower_bound=0.0)


NUMBERS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "every guess right and nothing follows": ("does not follow from its guesses", all_right),
    "a smaller bound": ("does not follow", lambda b: b["one_run"].update(epsilon_lower_bound=0.01)),
    "more guesses right": ("does not follow", lambda b: b["one_run"].update(right=90)),
    "a number of guesses nobody makes": ("none of the choices", lambda b: b["one_run"].update(guesses=98)),
    "more canaries than there can be": ("none of the choices", lambda b: b["one_run"].update(canaries=1 << 20)),
    "no confidence": ("confidence", lambda b: b["one_run"].update(confidence=0.0)),
    "certainty": ("confidence", lambda b: b["one_run"].update(confidence=1.0)),
    "another reading": ("does not follow", lambda b: b["one_run"].update(method="dp")),
    "a certain examination": ("confidence", lambda b: b["conformance"].update(confidence=1.0)),
    "another confidence": ("does not follow", lambda b: b["conformance"].update(confidence=0.99)),
    "no numbers": ("measured noise multiplier", lambda b: b["conformance"].update(samples=0)),
    "no numbers anywhere": ("rests on 0", lambda b: (every(b, samples=0), b["conformance"].update(samples=0))),
    "nothing fails": ("fails below 0", lambda b: every(b, alpha=0.0)),
    "what fails left out": ("not those of an examination", lambda b: b["conformance"]["findings"].pop(3)),
    "one check alone": ("not those of", lambda b: b["conformance"].update(findings=b["conformance"]["findings"][:1])),
    "one check twice": ("twice", lambda b: b["conformance"]["findings"].append(b["conformance"]["findings"][1])),
    "another sum": ("sum 'plain'", lambda b: b["conformance"].update(sum="plain")),
    "no noise and p = 0.5": ("is not the one", lambda b: every(b, p_value=0.5, measured=0.0, expected=0.0)),
    "another interval": ("measured noise", lambda b: b["conformance"].update(interval=[0.0, 99.0])),
    "another interval everywhere": ("does not follow", lambda b: wide(b)),
    "a p-value of its own": ("does not follow", lambda b: finding(b, "noise: variance").update(p_value=0.9)),
    "a shape of its own": ("noise: shape", lambda b: finding(b, "noise: shape").update(measured=0.2)),
    "another expectation": ("held against", lambda b: finding(b, "noise: beside records").update(expected=0.1)),
    "a divisor that is off": ("divisor", lambda b: finding(b, "neighbours: divisor").update(measured=0.5)),
    "steps over the cap": ("stops", lambda b: finding(b, "ledger: stops at the cap").update(measured=9.0)),
    "another smallest fault": ("smallest fault", lambda b: b["one_run"].update(detects_noise_factor=0.99)),
    "a step too cheap": ("price", lambda b: finding(b, "ledger: price").update(measured=0.2)),
    "a key seen twice": ("key", lambda b: finding(b, "noise: key").update(measured=1.0)),
    "a sum with more in it": ("nothing added", lambda b: finding(b, "sum: nothing added or lost").update(measured=1.0)),
    "a bounded support": ("largest value", lambda b: finding(b, "sites: largest value").update(measured=3.0)),
    "another network": ("another path", lambda b: b["conformance"]["examined"].update(network="mlp")),
    "another reader": ("another path", lambda b: b["conformance"]["examined"].update(reveal_to="sites")),
    "no path": ("not those of", lambda b: b["conformance"].pop("examined")),
    "steps not composed": ("composition", lambda b: finding(b, "ledger: composition").update(measured=0.5)),
}


def wide(body: dict[str, Any]) -> None:
    for part in (finding(body, "noise: variance"), body["conformance"]):
        part["interval"] = [0.0, 99.0]


@pytest.mark.parametrize("lie", NUMBERS)
def test_what_follows_from_an_audits_numbers_is_computed_again(spoilt, lie) -> None:
    said, change = NUMBERS[lie]
    results.held_against(edited(spoilt, lambda b: None), spoilt.plan)
    with pytest.raises(VerificationError, match=said):
        results.held_against(edited(spoilt, change), spoilt.plan)


def test_an_examination_that_failed_is_evidence_too(spoilt) -> None:
    """A program without enough noise: the page says so, and nothing stops the report from saying it."""
    short = variance("noise: variance", spoilt.plan.noise_multiplier, 0.8)
    assert not short.passed
    stopped = Finding("ledger: stops at the cap", "asks", 0.0, ALPHA, 4.0, 2.0, 4)
    failed: dict[str, Any] = {"noise: variance": short, stopped.name: stopped}
    said = examination(spoilt.plan, **failed)
    held = Evidence(spoilt.plan.hash, said)
    assert results.held_against(canonical.dumps(held.to_json()), spoilt.plan) == held
    (spoilt.folder / "audit.json").write_bytes(canonical.dumps(held.to_json()))
    build_report(spoilt.folder, spoilt.server)
    assert verify_report(spoilt.report).ok


def test_files_that_hold_no_audit(spoilt, tmp_path) -> None:
    for data in (b"", b"[]", b"{", b" " * (results.LIMIT + 1)):
        (tmp_path / "bad.json").write_bytes(data)
        with pytest.raises(VerificationError):
            results.attach(spoilt.folder, [tmp_path / "bad.json"])
        (spoilt.folder / "audit.json").write_bytes(data)
        assert not verify_report(spoilt.report).ok
    with pytest.raises(VerificationError, match="cannot be read"):
        results.attach(spoilt.folder, [tmp_path / "none.json"])
