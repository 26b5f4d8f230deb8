"""The conformance suite on this program: its own apps in one process, held against gradients computed apart."""

from __future__ import annotations

from typing import cast, get_args

from fedveil.common.errors import UsageError
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.deploy.lab.audit.reference import Autograd
from fedveil.privacy.audit.evidence import Conformance
from fedveil.privacy.audit.suite import Effort, examine
from fedveil.privacy.dp.clipping import Precision
from fedveil.privacy.plan import PrivacyPlan


def conformance(
    plan: PrivacyPlan, effort: Effort | None = None, engine: str = "auto", precision: str = "float32"
) -> Conformance:
    """Examine the path that ``plan`` takes through this program; see :func:`fedveil.privacy.audit.suite.examine`.

    Args:
        engine, precision: of the sites' clipping.

    Raises:
        UsageError: there is no such precision.
        RunAborted: no such engine, or it cannot clip the plan's network; or fewer sums were released than asked for.
        PlanError: see there.
    """
    if precision not in get_args(Precision):
        raise UsageError(f"unknown precision {precision[:32]!r}", hint=f"one of {', '.join(get_args(Precision))}")
    program = InProcess(engine=engine, precision=cast(Precision, precision))
    return examine(program, plan, effort, reference=Autograd(), engine=engine, precision=precision)
