"""No path that releases is without noise of the claimed law: every combination that a plan may have is carried out.

The combinations are read off the plan's own fields. A mode, sum, reader or task that is added later is tested here
without anybody thinking of it, and a combination that the rules begin to allow is too.

False alarms: each check of a right program fails with probability 1e-9, some hundred checks in all.
"""

import ast
import itertools
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import numpy as np
import pytest

import fedveil.client
from fedveil.client import round as line
from fedveil.common.errors import PlanError
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.statistics import ColumnStats, StatsSpec
from fedveil.deploy.lab.audit.implementation import InProcess
from fedveil.deploy.lab.audit.reference import Autograd
from fedveil.privacy.audit import noise_checks, own_path, share_checks
from fedveil.privacy.audit.slab import residuals, shares
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.privacy.plan_figures import PlanFigures

SITES, RARE = 4, 1e-9
NETWORK = ModelSpec(name="mlp", inputs=24, classes=3, hidden=(9,))
COLUMN = ColumnStats(
    column="age", source="number", at=0, low=0.0, high=1.0, moments=2, histogram=True,
    cuts=tuple(i / 250 for i in range(1, 250)),
)  # fmt: skip
TASKS = {"train": NETWORK, "stats": StatsSpec(inputs=1, classes=2, columns=(COLUMN,))}


def choices(name):
    return get_args(PlanFigures.model_fields[name].annotation)


def plan_of(mode, sum_, task, reveal_to, committee):
    model, rate = TASKS[task], 1.0 if task == "stats" or mode == "local" else 0.3
    return make_plan(
        mode=mode, sum=sum_, sites=SITES, records=200, noise_multiplier=1.3, steps=1 if task == "stats" else 4,
        clip=model.norm_bound if task == "stats" else 0.7, sample_rate=rate,
        model=model, optimizer=Optimizer(learning_rate=0.1), contract_hash="c" * 64, few_clients=True,
        local_steps=1 if task == "stats" or mode == "distributed" else 3, reveal_to=reveal_to, committee=committee,
        committee_seed="ab" * 32 if committee else "",
    )  # fmt: skip


ALL = list(itertools.product(choices("mode"), choices("sum"), TASKS, choices("reveal_to"), (0, SITES)))


def allowed(combination):
    try:
        return plan_of(*combination)
    except PlanError:
        return None


PLANS = {c: p for c in ALL if (p := allowed(c)) is not None}


def seen(plan):
    """What a recipient of the plan's sums sees, and what every site handed in, over no records."""
    return own_path.noise_alone(InProcess(), Autograd(), plan, numbers=1000, most=2)


def findings(runs):
    plan, z = runs.plan, residuals(runs.plan, runs.releases, np.zeros(runs.plan.model.parameters))
    each = shares(plan, runs.releases)
    assert set(each) == set(range(SITES))
    return [
        noise_checks.variance(z, plan.noise_multiplier, RARE, 0.95, SITES, "noise"),
        share_checks.every_site(each, RARE),
        share_checks.largest_share([each], RARE),
        share_checks.nothing_lost(runs.runs, plan.grid, RARE),
    ]


def test_every_field_that_chooses_a_path_is_among_the_combinations():
    """Another field of a plan with a closed list of values must be added to the combinations, or named here."""
    closed = {
        n
        for n, f in PlanFigures.model_fields.items()
        if get_args(f.annotation) and isinstance(get_args(f.annotation)[0], str)
    }
    assert closed == {"mode", "unit", "sum", "adjacency", "reveal_to"}  # the unit follows from mode and contract
    assert {m.task for m in PLANS.values()} == set(TASKS)
    assert {c[0] for c in PLANS} == set(choices("mode"))
    assert {c[1] for c in PLANS} == set(choices("sum"))
    assert {c[3] for c in PLANS} == set(choices("reveal_to"))
    assert {bool(c[4]) for c in PLANS} == {False, True}
    assert len(PLANS) == 28  # of 96: more means that a rule of plans has become weaker


def named(combination):
    return "-".join(map(str, combination))


def dear(combination):
    """The classic CKKS sum makes large keys: the default suite takes one path of it."""
    late = combination[1] == "sharedkey" and combination[:3] != ("distributed", "sharedkey", "train")
    return pytest.param(combination, marks=pytest.mark.slow) if late else combination


@pytest.mark.parametrize("combination", [dear(c) for c in PLANS], ids=named)
def test_the_path_releases_the_claimed_noise(combination):
    runs = seen(PLANS[combination])
    assert [f.name for f in findings(runs) if not f.passed] == []
    assert {c.prices for r in runs.runs for c in r.charges.values()} == {((PLANS[combination].sample_rate, 1.3),)}


@pytest.mark.slow
@pytest.mark.parametrize("combination", list(PLANS), ids=named)
def test_a_site_with_half_of_the_noise_is_found_on_the_path(combination):
    """Negative control: the first site draws half of its noise in the second release."""
    draw, calls, steps = line.discrete_gaussian, iter(range(1000)), PLANS[combination].noisy_steps

    def halved(std, size):
        return draw(std / 2 if next(calls) % (SITES * steps) < steps else std, size)

    with patch.object(line, "discrete_gaussian", halved):
        found = findings(seen(PLANS[combination]))
    assert "sites: noise" in [f.name for f in found if not f.passed]


def test_one_function_of_a_site_hands_values_to_a_sum():
    """So the one that charges and draws the noise cannot be gone round."""
    calls = []
    for path in sorted(Path(fedveil.client.__path__[0]).rglob("*.py")):
        for f in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(f, ast.FunctionDef):
                calls += [
                    (path.name, f.name)
                    for n in ast.walk(f)
                    if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
                    and n.func.attr == "contribute" and "sum" in ast.unparse(n.func.value)
                ]  # fmt: skip
    assert calls == [("round.py", "contribute")]
