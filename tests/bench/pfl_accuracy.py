"""pfl-research's federated averaging with central DP on given clients. Runs in an interpreter that has pfl and torch.

`python pfl_accuracy.py data.npz '{"steps": ..., "local": ..., "learning_rate": ..., "clip": ..., "noise": ...}'` prints
the accuracy on the test part. See mnist_table.py.
"""

# pyright: reportMissingImports=false

import json
import sys

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy import CentrallyAppliedPrivacyMechanism, GaussianMechanism
from torch import nn

DATA, GIVEN = dict(np.load(sys.argv[1])), json.loads(sys.argv[2])


class Net(nn.Module):
    """A linear network that starts at zero, in the form that pfl asks for."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(DATA["X"].shape[1], 10)
        for p in self.net.parameters():
            nn.init.zeros_(p)

    def loss(self, x, y, eval=False):
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x, y, eval=True):
        """The loss, weighted by the records."""
        return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}


def main():
    """Run and print."""
    np.random.seed(GIVEN["seed"])  # noqa: NPY002 - pfl draws its noise here
    torch.manual_seed(GIVEN["seed"])
    ends = np.cumsum(DATA["sizes"])
    users = [
        (torch.from_numpy(DATA["X"][a:b]), torch.from_numpy(DATA["y"][a:b]))
        for a, b in zip(ends - DATA["sizes"], ends, strict=True)
    ]
    clients = FederatedDataset(
        lambda user: Dataset(raw_data=list(users[user]), user_id=user),
        get_user_sampler("minimize_reuse", list(range(len(users)))),
    )
    net = Net()
    mechanism = GaussianMechanism(clipping_bound=GIVEN["clip"], relative_noise_stddev=GIVEN["noise"])
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=GIVEN["steps"], evaluation_frequency=10**6, train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=clients, val_data=None, postprocessors=[CentrallyAppliedPrivacyMechanism(mechanism)]
        ),
        model=PyTorchModel(
            model=net, local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=GIVEN["local"], local_learning_rate=GIVEN["learning_rate"], local_batch_size=None
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[],
    )  # fmt: skip
    with torch.no_grad():
        guessed = net.net(torch.from_numpy(DATA["X_test"])).argmax(1).numpy()
    print(json.dumps({"accuracy": float((guessed == DATA["y_test"]).mean())}))


main()
