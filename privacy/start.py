"""Where a run's model starts: the same bits at the server and at every site, without sending them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build, flatten
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import Optimizer, PrivacyPlan


def start(plan: PrivacyPlan) -> ModelState:
    """The network's public initialisation; zeros for statistics, to which their sum is added.

    Raises:
        ModelError: the network cannot be built, or its base's file was not given.
    """
    if plan.task == "stats":
        return ModelState.start(np.zeros(plan.model.parameters, np.float32), plan.optimizer)
    return _start(plan.network, plan.optimizer)


@lru_cache(maxsize=2)  # asked for by every virtual site of a process
def _start(network: ModelSpec, optimizer: Optimizer) -> ModelState:
    return ModelState.start(flatten(build(network)), optimizer)
