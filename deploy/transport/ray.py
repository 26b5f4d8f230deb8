"""Simulation over many processes or machines: the same apps on Flower's own engine, which runs on Ray.

Flower numbers the virtual sites itself and tells an app only its ``partition-id``. Each site's ``node_config``
therefore travels inside the wrapped client app and is laid over Flower's context before our app sees it:
``partition-id`` ``i`` is ``sites[i]``, and ``node_config["site"]`` names it. Flower's node numbers are random here: a
server learns who is who from the sites' signed answers, as everywhere. To use a cluster set ``RAY_ADDRESS``; fedveil
must be installed there.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import ConfigError, FedveilError, TransportError
from fedveil.common.units import SiteId

_REGISTRATION_S = 60.0


def run_ray(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    sites: Sequence[SiteId],
    node_config: Callable[[int], dict[str, Any]],
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> None:
    """Run ``server_app`` to its end over ``sites`` as Ray actors.

    Args:
        client_app: found by Ray's processes by import, so it belongs in an installed module.
        node_config: from a site's position to its ``node_config``.
        cpus, gpus: what one site occupies while it works; together with the machine they fix how many work at once.

    The server app's exceptions are the caller's; a client app's become error replies, as on every engine.

    Raises:
        ConfigError: two sites have one name.
        FedveilError: Ray is not installed.
    """
    if len(set(sites)) != len(sites):
        raise ConfigError("two simulated sites have the same name", hint="give every site its own name")
    if importlib.util.find_spec("ray") is None:
        raise FedveilError("the engine 'ray' needs the library ray", hint="pip install 'fedveil[sim]'")
    flower.quiet_flower()
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    configs = [{**node_config(i), "site": site} for i, site in enumerate(sites)]
    level = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.ERROR)  # Flower warns that its Python API will move to a command
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray and Flower raise deprecation warnings about each other's API
            importlib.import_module("flwr.simulation").run_simulation(
                _waiting_server(server_app, len(sites)),
                ConfiguredClient(client_app, configs),
                num_supernodes=len(sites),
                backend_config={
                    "client_resources": {"num_cpus": cpus, "num_gpus": gpus},
                    "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"},
                },
            )
    finally:
        logging.getLogger("flwr").setLevel(level)


class ConfiguredClient(ClientApp):
    """``app`` with every site's configuration; what Ray carries to its processes."""

    def __init__(self, app: ClientApp, node_configs: list[dict[str, Any]]) -> None:
        super().__init__()
        self._app, self._node_configs = app, node_configs

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer with the configuration laid over a copy of Flower's context, whose own must stay as it is."""
        own = self._node_configs[int(context.node_config["partition-id"])]
        node_config = {**context.node_config, **own}
        inner = Context(context.run_id, context.node_id, node_config, context.state, context.run_config)
        out = flower.answer(self._app, message, inner)
        context.state = inner.state
        return out


def _waiting_server(app: ServerApp, sites: int) -> ServerApp:
    wrapped = ServerApp()

    @wrapped.main()
    def main(grid: Grid, context: Context) -> None:
        _wait_for_nodes(grid, sites)
        app(grid, context)

    return wrapped


def _wait_for_nodes(grid: Grid, count: int) -> None:
    """Flower starts the server app before it has registered the virtual nodes, and offers nothing to wait on."""
    end = time.monotonic() + _REGISTRATION_S
    while len(list(grid.get_node_ids())) < count:
        if time.monotonic() > end:
            raise TransportError(f"Flower did not register {count} nodes within {_REGISTRATION_S:g} seconds")
        time.sleep(0.05)
