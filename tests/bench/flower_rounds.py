"""Flower on Ray: federated averaging over all clients, without privacy. Runs in an interpreter with flwr[simulation].

`python flower_rounds.py '[clients, records, inputs, classes, hidden, whole client, rounds]'` prints the seconds of each
round, by the clock: Ray's processes share the machine's cores. See simulate_table.py.
"""

import json
import logging
import os
import sys
import time

os.environ.update({"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"})

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

CLIENTS, RECORDS, INPUTS, CLASSES, HIDDEN, _, ROUNDS = json.loads(sys.argv[1])


def network() -> nn.Module:
    """The network of the case."""
    own = [nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)] if HIDDEN else []
    return nn.Sequential(*(own or [nn.Linear(INPUTS, CLASSES)]))


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Five steps of full-batch descent on the client's own records."""
    torch.set_num_threads(1)
    net = network()
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    rng = np.random.default_rng(int(context.node_config["partition-id"]))  # noqa: TID251 - public made-up data
    X = torch.from_numpy(rng.standard_normal((RECORDS, INPUTS)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, CLASSES, RECORDS))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        optimiser.step()
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": RECORDS})}
    return Message(content=RecordDict(content), reply_to=message)


class Timed(FedAvg):
    """Federated averaging that notes the time after each round."""

    at: list[float]

    def aggregate_train(self, server_round, replies):
        """As Flower's."""
        out = super().aggregate_train(server_round, replies)
        self.at.append(time.perf_counter())
        return out


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run and print."""
    while len(list(grid.get_node_ids())) < CLIENTS:
        time.sleep(0.05)
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    strategy.at = []
    strategy.start(grid=grid, initial_arrays=ArrayRecord(network().state_dict()), num_rounds=ROUNDS + 1)
    print(json.dumps({"rounds": [b - a for a, b in zip(strategy.at, strategy.at[1:])]}))  # noqa: B905 - an older Python


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    run_simulation(
        server, client, num_supernodes=CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"},
        },
    )  # fmt: skip
