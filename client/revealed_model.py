"""The model of a run whose sums only the sites can read (``reveal_to = "sites"``).

The server opens blinded sums and sends them. Every site removes the blinding and takes the same optimiser step. A
model's name is then the hash of the chain of blinded sums that it came from. The server and all sites can compute this
name, although the server knows no weight.
"""

from __future__ import annotations

import io

import numpy as np

from fedveil.common.errors import ProtocolError
from fedveil.common.wire import Packet
from fedveil.common.workload.torch.networks import build, flatten
from fedveil.privacy.joining import chained
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.interface import SiteSum
from fedveil.privacy.secagg.store import Store


class RevealedModel:
    """One site's copy of the model. At most one state stays on disk. It is erased only after the next is written.

    Attributes:
        round: the last round whose sum is in the model; 0 at the public initialisation.
        name: the chain's hash.
        state: weights and velocity.
    """

    def __init__(self, plan: PrivacyPlan, sum_: SiteSum, store: Store) -> None:
        self._plan, self._sum, self._store = plan, sum_, store
        self.state = ModelState.start(flatten(build(plan.network)))
        self.round, self.name = 0, self.state.hash
        for number in range(plan.steps, 0, -1):
            if (held := store.get(_key(number))) is not None:
                self._load(number, held)
                break

    def apply(self, packet: Packet) -> None:
        """Remove the blinding of the next sum and take the step. A sum that is already in the model changes nothing.

        Raises:
            SecureSumError: it does not open to a sum that T helpers agreed on.
            ProtocolError: its round is no round of the plan.
        """
        number = packet.header.get("round")
        if type(number) is not int or not 1 <= number <= self._plan.steps:
            raise ProtocolError("a blinded sum of a round that is not in the plan")
        if number <= self.round:
            return
        values, _ = self._sum.unblind(packet)
        state = self.state.step(self._plan, values.astype(np.float64) * self._plan.grid)
        name = chained(self.name, packet)
        out = io.BytesIO()
        np.savez(out, weights=state.weights, velocity=state.velocity, name=np.frombuffer(bytes.fromhex(name), np.uint8))
        self._store.put(_key(number), out.getvalue())
        if self.round:
            self._store.erase(_key(self.round))
        self.state, self.round, self.name = state, number, name

    def _load(self, number: int, held: bytes) -> None:
        with np.load(io.BytesIO(held), allow_pickle=False) as z:
            self.state, self.round = ModelState(z["weights"], z["velocity"]), number
            self.name = z["name"].tobytes().hex()


def _key(number: int) -> str:
    return f"revealed-{number}"
