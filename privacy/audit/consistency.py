"""An audit's results checked against themselves and the plan: whatever follows from their numbers is computed again.

What was measured stays the word of whoever measured it: residuals, scores and coins are not kept. Of a single run, the
bound is computed again from the guesses. Of an examination, these are computed again: the p-value and the interval of
the variance, the p-values of the distribution's shape and of the largest values, and the verdicts of the checks without
chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isclose

from fedveil.common.errors import VerificationError
from fedveil.privacy.audit import noise_checks, one_run, own_path, record_checks
from fedveil.privacy.audit.evidence import ALPHA, Conformance, Examined, Finding
from fedveil.privacy.audit.one_run import OneRun
from fedveil.privacy.audit.slab import QUIET, price, sampled
from fedveil.privacy.plan import PrivacyPlan

MAX_CANARIES = 1 << 13  # as many as the command allows: reading the guesses takes time
LOW, HIGH = 0.5, 0.9999  # confidence
_VARIANCE, _BESIDE, _SHAPE = "noise: variance", "noise: beside records", "noise: shape"
_FIRST = (
    _VARIANCE, "noise: every round", "noise: every coordinate", "noise: mean", _SHAPE, "noise: coordinates independent",
    "ledger: composition", _BESIDE, "clip: norm of a record", "clip: whole gradient", "neighbours: noise",
    "neighbours: divisor", "neighbours: distance", "noise: rounds independent", "ledger: stops at the cap",
)  # fmt: skip
_SAMPLED = ("sampling: rate", "sampling: random batch size", "sampling: rounds independent")
_SINCE = (
    "noise: every block", "noise: largest value", "sites: noise", "sites: largest value", "sum: nothing added or lost",
    "noise: key", "ledger: price", "places: at random", *own_path.NAMES,
)  # fmt: skip
_LARGEST = ("noise: largest value", "sites: largest value", own_path.NAMES[2])
_SURE: dict[str, Callable[[Finding], bool]] = {  # checks without chance, by what their verdict rests on
    "neighbours: divisor": lambda f: f.measured < record_checks.OFF,
    "ledger: composition": lambda f: f.measured <= record_checks.LOOSE,
    "ledger: stops at the cap": lambda f: f.measured == f.expected,
    "ledger: price": lambda f: f.measured <= record_checks.CHEAP,
    "sum: nothing added or lost": lambda f: f.measured == 0,
    "noise: key": lambda f: f.measured == 0,
}


def checks_of(plan: PrivacyPlan, examined: Examined | None) -> tuple[str, ...]:
    """The names of all checks that an examination of ``plan`` makes; of the first suite's for None."""
    return (*_FIRST, *(() if examined is None else _SINCE), *(_SAMPLED if sampled(plan) else ()))


def conformance(c: Conformance, plan: PrivacyPlan) -> None:
    """Raise :class:`VerificationError` unless ``c`` can be the examination of ``plan``."""
    if c.claimed != plan.noise_multiplier:
        raise _no("the noise was held against another noise multiplier than the plan's")
    first = c.examined is None and (plan.mode == "client" or plan.task == "stats")  # which that suite did not examine
    if first or c.sum != plan.sum:
        raise _no(f"the sum {c.sum[:32]!r} was examined, the plan's is {plan.sum!r} in mode {plan.mode!r}")
    if c.examined is not None and c.examined != Examined.of(plan, c.examined.engine, c.examined.precision):
        raise _no("another path was examined than the plan's")
    _confident(c.confidence)
    names = [f.name for f in c.findings]
    if sorted(names) != sorted(checks_of(plan, c.examined)):
        odd = sorted(set(names) ^ set(checks_of(plan, c.examined))) or ["one of them twice"]
        raise _no(f"its checks are not those of an examination: {', '.join(n[:64] for n in odd[:4])}")
    for f in c.findings:
        if f.alpha != ALPHA or f.samples < 1:
            raise _no(f"{f.name!r} fails below {f.alpha:g} and rests on {f.samples} numbers; it is {ALPHA:g}, of some")
        if f.name in _SURE and f.passed and not _SURE[f.name](f):
            raise _no(f"{f.name!r} is said to have passed with {f.measured:g} measured")
    by = {f.name: f for f in c.findings}
    found = by[_VARIANCE]
    if (c.measured, c.low, c.high, c.samples) != (found.measured, *(found.interval or ()), found.samples):
        raise _no("the measured noise multiplier is not the one of its own check")
    _variance(found, plan.noise_multiplier, c.confidence)
    _variance(by[_BESIDE], min(plan.noise_multiplier, QUIET), c.confidence)
    if c.examined is not None:
        _own_path(by, plan, c.confidence)
    shape = by[_SHAPE]
    if not _near(shape.p_value, noise_checks.kolmogorov(shape.measured, shape.samples)):
        raise _no(f"the p-value of {_SHAPE!r} does not follow from the distance measured")


def _own_path(by: Mapping[str, Finding], plan: PrivacyPlan, confidence: float) -> None:
    _variance(by[own_path.NAMES[0]], plan.noise_multiplier, confidence)
    _variance(by[own_path.NAMES[4]], min(plan.noise_multiplier, QUIET), confidence)
    for f in (by[name] for name in _LARGEST):
        if not _near(f.p_value, noise_checks.extreme(f.measured, f.samples)):
            raise _no(f"the p-value of {f.name!r} does not follow from the largest value")


def single_run(o: OneRun, plan: PrivacyPlan) -> None:
    """Raise :class:`VerificationError` unless the bound of ``o`` follows from its guesses, at the plan's ε and δ."""
    if o.delta != plan.delta or not isclose(o.claimed, plan.claim, rel_tol=1e-6):
        raise _no("the lower bound was held against another ε or δ than the plan's")
    _confident(o.confidence)
    g = o.guesses
    if not 10 <= g.canaries <= MAX_CANARIES or g.made not in [2 * k for k in one_run.sizes(g.canaries)]:
        raise _no(f"{g.made} guesses about {g.canaries} canaries are none of the choices of an audit")
    own = one_run.corrected(g, o.delta, o.confidence, o.method)
    if not _near(o.bound, own):
        raise _no(f"a lower bound of {o.bound:.6g} does not follow from its guesses, which give {own:.6g}")
    if o.detects is None:
        return
    least = one_run.detectable(g.canaries, price(plan), plan.steps, o.claimed, o.delta, o.confidence, o.method)
    if not _near(o.detects, least):
        raise _no(f"the smallest fault that it finds, noise x{o.detects:.3g}, does not follow: it is x{least:.3g}")


def _variance(f: Finding, claimed: float, confidence: float) -> None:
    square = (f.measured / claimed) ** 2 * f.samples
    _, low, high = noise_checks.of_square(square, f.samples, claimed, confidence)
    p = noise_checks.two_sided(square, f.samples)
    if f.expected != claimed or f.interval is None or f.measured < 0:
        raise _no(f"{f.name!r} was held against {f.expected:g} and not {claimed:g}, or has no interval")
    if not (_near(f.p_value, p) and _near(f.interval[0], low) and _near(f.interval[1], high)):
        raise _no(f"the interval or the p-value of {f.name!r} does not follow from what was measured")


def _confident(value: float) -> None:
    if not LOW <= value <= HIGH:
        raise _no(f"a confidence of {value:g} is outside {LOW:g}..{HIGH:g}")


def _near(a: float, b: float) -> bool:
    return isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def _no(what: str) -> VerificationError:
    return VerificationError(f"audit.json: {what}")
