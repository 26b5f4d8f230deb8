"""Simulation over many processes or machines: workers of a Ray cluster, each of which speaks for many sites.

A worker answers with the same client app as every engine, for all messages of a step in one call. Where a worker dies,
or its machine, Ray starts it again on what is left, and asks it again what it had not answered: what its sites had done
follows from files, which all machines of the cluster must see at the same place. RAY_ADDRESS names the cluster; without
it, one is made on this machine. fedveil must be installed on every machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError, TransportError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.deploy.transport.inprocess import InprocessGrid
from fedveil.privacy.secagg.plain import Together

_AT_ONCE = 64  # messages to one worker whose answers are held at a time


class Host(Protocol):
    """What lives in a worker's process and speaks for its sites."""

    app: ClientApp
    node_config: dict[str, Any]

    def together(self, sites: Sequence[int], request: Packet) -> Together:
        """What these sites contribute in one pass."""
        ...

    def close(self) -> None:
        """Write what the run's folder is to hold, and give files back."""
        ...


MakeHost = Callable[[int], Host]  # for the worker at a position


class Cluster:
    """A connection to Ray; a cluster that was made here ends with it.

    Raises:
        FedveilError: Ray is not installed.
        TransportError: the cluster that RAY_ADDRESS names does not answer.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise FedveilError("the engine 'ray' needs the library ray", hint="pip install 'fedveil[sim]'")
        os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
        self.ray: Any = importlib.import_module("ray")
        self._own = not self.ray.is_initialized()
        address = os.environ.get("RAY_ADDRESS", "")
        how = {} if address else {"include_dashboard": False, "num_cpus": os.cpu_count()}
        if self._own:
            try:
                _reached(address)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Ray's deprecations are its own affair
                    self.ray.init(address or "local", log_to_driver=False, logging_level="error", **how)
            except (OSError, RuntimeError, ValueError) as e:
                raise TransportError(
                    f"the Ray cluster {address or 'on this machine'} does not answer: {type(e).__name__}",
                    hint="start one with Ray's command 'ray start', and set RAY_ADDRESS to what it prints; or unset it",
                ) from e

    @property
    def processors(self) -> int:
        """Of all machines together."""
        return max(1, int(self.ray.cluster_resources().get("CPU", 1)))

    def workers(self, make: MakeHost, count: int) -> list[Any]:
        """So many workers, spread over the machines; each makes its host, again wherever it is started again."""
        # An actor that asks for no processor of its own can be started again where all are taken.
        remote = self.ray.remote(_Worker).options(
            max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD", num_cpus=0
        )
        return [remote.remote(make, i) for i in range(count)]

    def results(self, calls: Sequence[Any]) -> list[Any]:
        """Wait for calls to workers.

        Raises:
            TransportError: a worker is lost for good; nothing of the cluster is left, or its host cannot be made.
        """
        try:
            return self.ray.get(list(calls))
        except self.ray.exceptions.RayError as e:
            raise TransportError(
                f"a worker of the Ray cluster is lost: {type(e).__name__}",
                hint="see that fedveil is installed, and the run's folder seen, on every machine of the cluster",
            ) from e

    def close(self) -> None:
        """Leave the cluster."""
        if self._own:
            self.ray.shutdown()


def _reached(address: str) -> None:
    """Ray itself waits for minutes for a cluster that is not there; :class:`OSError` where nobody listens."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class _Worker:
    def __init__(self, make: MakeHost, position: int) -> None:
        self._host = make(position)

    def answer(self, run_id: int, asked: list[tuple[int, Message]]) -> list[Message]:
        """The answers of the sites at these positions, in order."""
        return [flower.answer(self._host.app, m, self._context(run_id, i, m)) for i, m in asked]

    def together(self, sites: list[int], request: Packet) -> Together:
        return self._host.together(sites, request)

    def close(self) -> None:
        self._host.close()

    def _context(self, run_id: int, index: int, message: Message) -> Context:
        config = {"partition-id": index, **self._host.node_config}
        return Context(run_id, message.metadata.dst_node_id, config, RecordDict(), {})


class RayGrid(InprocessGrid):
    """Flower's ``Grid`` over workers of a Ray cluster. Site i is spoken for by worker i modulo their number.

    Args:
        cluster: a connection.
        make: makes what lives in the worker at a position; it travels to the worker.
        sites: the virtual sites' names, each once.
        count: number of workers.
    """

    def __init__(self, cluster: Cluster, make: MakeHost, sites: Sequence[SiteId], count: int) -> None:
        super().__init__(ClientApp(), sites, lambda _: {})
        self._cluster, self._workers = cluster, cluster.workers(make, count)
        self._index = {site: i for i, site in enumerate(sites)}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Ask every worker once for all its sites; their answers have come when this returns."""
        asked: dict[int, list[tuple[int, Message]]] = {}
        ids: list[str] = []
        for message in messages:
            ids.append(flower.stamp(message))
            site = self.site_of(message.metadata.dst_node_id)
            self._traffic.add(site, sent=flower.content_bytes(message))
            index = self._index[site]
            asked.setdefault(index % len(self._workers), []).append((index, message))
        run = self._run.run_id
        calls = [self._workers[w].answer.remote(run, part) for w, part in asked.items()]
        for part, answers in zip(asked.values(), self._cluster.results(calls), strict=True):
            for (_, message), answer in zip(part, answers, strict=True):
                site = self.site_of(message.metadata.dst_node_id)
                self._traffic.add(site, received=flower.content_bytes(answer))
                self._replies[message.metadata.message_id] = answer
        return ids

    def replies(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies one by one, of which some are held at a time."""
        left = iter(messages)
        while some := list(islice(left, _AT_ONCE * len(self._workers))):
            yield from self.send_and_receive(some)

    def passes(self, sites: Sequence[SiteId], request: Packet) -> list[Together]:
        """What these sites contribute in one pass of each worker."""
        asked: dict[int, list[int]] = {}
        for site in sites:
            asked.setdefault(self._index[site] % len(self._workers), []).append(self._index[site])
        return self._cluster.results([self._workers[w].together.remote(part, request) for w, part in asked.items()])

    def close(self) -> None:
        """Have every worker write what the run's folder is to hold."""
        self._cluster.results([w.close.remote() for w in self._workers])
