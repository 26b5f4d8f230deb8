"""Hospitals on different machines, as far as one machine can play them, step to the same bits round after round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedveil.deploy.lab.demo_hospitals import HOSPITALS

ROUNDS = 200
# Threads of the linear algebra, the vector units that torch uses, and those that NumPy does not.
MACHINES = (("1", "default", ""), ("2", "avx2", ""), ("4", "avx512", "AVX2 FMA3"), ("1", "avx2", "AVX2 FMA3"))


@pytest.mark.slow
def test_two_hundred_rounds_end_in_one_model_on_every_machine(consortium: Callable[..., Any]) -> None:
    """Every round has all members: a site whose state differed by a bit would name another, and be left out."""
    c = consortium("machines", forked=False, steps=ROUNDS)
    c.server()
    for site, (threads, torch_units, numpy_less) in zip(HOSPITALS, MACHINES, strict=True):
        env = {
            "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "ATEN_CPU_CAPABILITY": torch_units,
            "NPY_DISABLE_CPU_FEATURES": numpy_less, "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        c.site(site, env=env)
    assert c.code("server") == 0, c.log("server")
    applied = c.of_kind("round.applied")
    assert [(b["round"], len(b["members"])) for b in applied] == [(n, len(HOSPITALS)) for n in range(1, ROUNDS + 1)]
    models = [[r.body["model_hash"] for r in c.ledger(site) if r.kind == "model"] for site in HOSPITALS]
    assert models == [[applied[-1]["model_hash"]]] * len(HOSPITALS)
