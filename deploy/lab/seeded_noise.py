"""``--debug-noise-seed``: the sites of a simulation draw noise that follows from a seed. NOT PRIVATE; for debugging.

What site i draws in round r follows from (seed, i, r). So two runs give the same opened sums, bit by bit: under another
engine or after a resume too. Every site answers for itself then; there is no common pass.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedveil.privacy.dp.debug_noise import replayed, seeded

SEED = "debug-noise-seed"  # of a virtual site's node_config


class Seeded(ClientApp):
    """``app``, whose contributions are drawn from the seed that the node's configuration holds, if it holds one."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self._app = app

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer; only what a contribution draws is seeded."""
        seed = context.node_config.get(SEED)
        if seed is None or message.metadata.message_type != "train.contribute":
            return self._app(message, context)
        with seeded(int(seed), int(context.node_config["partition-id"]), int(message.metadata.group_id)):
            return self._app(message, context)


def losses(rate: float, seed: int) -> Callable[[], bool]:
    """Whether the next contribution is lost, with probability ``rate``: the same answers for the same seed."""
    asked = 0

    def lost() -> bool:
        nonlocal asked
        asked += 1
        with seeded(seed, "lost", asked):
            return int.from_bytes(replayed(4) or b"", "big") < rate * (1 << 32)

    return lost
