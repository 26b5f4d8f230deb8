"""pfl-research: federated averaging over all clients, with central DP. Runs in an interpreter that has pfl and torch.

`python pfl_rounds.py '[clients, records, inputs, classes, hidden, whole client, rounds]'` prints the CPU seconds of
each round. See simulate_table.py.
"""

# pyright: reportMissingImports=false

import json
import sys
import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy import CentrallyAppliedPrivacyMechanism, GaussianMechanism
from torch import nn

CLIENTS, RECORDS, INPUTS, CLASSES, HIDDEN, _, ROUNDS = json.loads(sys.argv[1])


class Net(nn.Module):
    """The network of the case, in the form that pfl asks for."""

    def __init__(self):
        super().__init__()
        own = [nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)] if HIDDEN else []
        self.net = nn.Sequential(*(own or [nn.Linear(INPUTS, CLASSES)]))

    def loss(self, x, y, eval=False):
        """Cross-entropy."""
        self.train(not eval)
        return nn.functional.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x, y, eval=True):
        """The loss, weighted by the records."""
        return {"loss": Weighted(self.loss(x, y, eval=True).item() * len(y), len(y))}


class Clock(TrainingProcessCallback):
    """CPU time after each round."""

    def __init__(self):
        self.at = [time.process_time()]

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Never ends the training."""
        self.at.append(time.process_time())
        return False, Metrics()


def main():
    """Run and print."""
    torch.set_num_threads(1)
    rng, net, clock = np.random.default_rng(0), Net(), Clock()  # noqa: TID251 - public made-up data
    data = [
        (torch.from_numpy(rng.standard_normal((RECORDS, INPUTS)).astype(np.float32)),
         torch.from_numpy(rng.integers(0, CLASSES, RECORDS)))
        for _ in range(CLIENTS)
    ]  # fmt: skip
    users = FederatedDataset(
        lambda user: Dataset(raw_data=list(data[user]), user_id=user),
        get_user_sampler("minimize_reuse", list(range(CLIENTS))),
    )
    private = CentrallyAppliedPrivacyMechanism(GaussianMechanism(clipping_bound=1.0, relative_noise_stddev=1.0))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=ROUNDS + 1, evaluation_frequency=10**6, train_cohort_size=CLIENTS, val_cohort_size=0
        ),
        backend=SimulatedBackend(training_data=users, val_data=None, postprocessors=[private]),
        model=PyTorchModel(
            model=net, local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(local_num_epochs=5, local_learning_rate=0.1, local_batch_size=None),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
    )  # fmt: skip
    print(json.dumps({"rounds": [b - a for a, b in zip(clock.at[1:], clock.at[2:])]}))  # noqa: B905 - an older Python


main()
