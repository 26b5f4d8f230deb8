"""Virtual sites that contribute in one pass, where a run's sum is in the clear: everything else goes by messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from flwr.clientapp import ClientApp

from fedveil.client import together
from fedveil.client.session import Site
from fedveil.common import canonical
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import FedveilError
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.deploy.transport.inprocess import InprocessGrid
from fedveil.deploy.transport.ray import RayGrid
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.plain import Together, header


def fits(plan: PrivacyPlan) -> bool:
    """Whether the sites of a simulation of ``plan`` can contribute in one pass."""
    return plan.sum == "plain" and plan.task == "train" and plan.noisy_steps == 1


class _Passes(InprocessGrid):
    """A grid whose sites contribute in passes. They join, and end their session, by messages."""

    def passes(self, sites: Sequence[SiteId], request: Packet) -> Iterable[Together]:
        """What these sites contribute, which all get the same request: one or more sums."""
        raise NotImplementedError

    def together(self, packets: Mapping[SiteId, Packet]) -> Together:
        """What the sites contribute that get ``packets``. The traffic is counted as if messages had been sent."""
        asked: dict[int, list[SiteId]] = {}
        for site, packet in packets.items():
            if not self.is_lost():
                asked.setdefault(id(packet), []).append(site)
        given: Together | None = None
        refusals: dict[SiteId, FedveilError] = {}
        for sites in asked.values():
            request = packets[sites[0]]
            for some in self.passes(sites, request):
                self._count(request, some)
                refusals |= some.refusals
                if some.sites:
                    before = () if given is None else given.sites
                    values = some.values if given is None else given.values + some.values
                    given = Together((*before, *some.sites), some.state, values, {})
        return Together.nothing(refusals) if given is None else given._replace(refusals=refusals)

    def is_lost(self) -> bool:
        """Whether the next request for a contribution is lost."""
        return False

    def _count(self, request: Packet, given: Together) -> None:
        sent = len(canonical.dumps(request.header)) + sum(map(len, request.buffers.values()))
        h = request.header
        answer = header("plain", h["session"], h["round"], h["nonce"], SiteId(""), given.state)
        received = len(canonical.dumps(answer)) + given.values.nbytes
        for site in given.sites:
            self._traffic.add(site, sent=sent, received=received + len(site))
        for site, error in given.refusals.items():
            self._traffic.add(site, sent=sent, received=len(flower.error_text(error)))


class TogetherGrid(_Passes):
    """The sites of this process, all in one pass.

    Args:
        find: gives the site at a position.
        lost: whether the next request for a contribution is lost; None: none is.
        logged: around a pass; the rows of the sites' ledgers are kept when it ends.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: Sequence[SiteId],
        find: Callable[[int], Site],
        *,
        lost: Callable[[], bool] | None = None,
        logged: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(client_app, sites, lambda _: {})
        self._find, self._lost, self._logged = find, lost, logged
        self._index = {site: i for i, site in enumerate(sites)}

    def passes(self, sites: Sequence[SiteId], request: Packet) -> list[Together]:
        """See the base class."""
        with self._logged():
            return [together.contribute((self._find(self._index[s]) for s in sites), request)]

    def is_lost(self) -> bool:
        """See the base class."""
        return self._lost is not None and self._lost()


class RayTogetherGrid(RayGrid, _Passes):
    """The sites of a Ray cluster, in one pass of each worker."""
