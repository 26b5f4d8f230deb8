"""jax_privacy as a second opinion on the one-run bounds. Runs where JAX_PRIVACY_PYTHON names an interpreter with it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from fedveil.privacy.audit.one_run import Guesses, lower_bound

PYTHON = os.environ.get("JAX_PRIVACY_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="JAX_PRIVACY_PYTHON names no interpreter with jax_privacy")
CASES = [
    (m, g, int(g * share)) for m in (200, 1000, 5000) for g in (20, 100, 200) for share in (0.4, 0.6, 0.8, 0.95, 1)
]


@pytest.mark.parametrize("delta", [1e-6, 1e-4, 1e-2])
def test_the_same_bounds(delta):
    script = Path(__file__).with_name("jax_privacy_run.py")
    cases = [":".join(map(str, c)) for c in CASES]
    done = subprocess.run([PYTHON, script, repr(delta), *cases], capture_output=True, text=True, check=True)
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(theirs) == len(CASES)
    for case, found in zip(CASES, theirs, strict=True):
        assert lower_bound(Guesses(*case), delta, 0.05, "dp") == pytest.approx(found["dp"], abs=1e-4), case
        assert lower_bound(Guesses(*case), delta, 0.05, "gaussian") == pytest.approx(found["fdp"], abs=1e-4), case
