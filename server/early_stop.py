"""Ends a run when a metric on the public table no longer rises: the rest of the budget stays in the sites' ledgers.

The metric is computed from opened sums on public records. So it costs nothing, and the run's end tells nothing that the
sums did not tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedveil.common.errors import PlanError


class EarlyStop:
    """Counts the rounds since a metric was at its best.

    Args:
        patience: so many applied rounds without a new best end the run; 0: none do.
        metric: its name among the metrics of a round.
        metrics: the run's ``metrics.jsonl``, from which a run that goes on remembers.
        classes: of the network; ``auc`` is for two.
        stopped: the run was to end here before its server stopped: it does, whatever is asked for now.

    Raises:
        PlanError: the public table gives no such metric.
    """

    def __init__(self, patience: int, metric: str, metrics: Path, *, classes: int, stopped: bool = False) -> None:
        if patience and metric == "auc" and classes != 2:
            raise PlanError(f"there is no area under the curve of {classes} classes", hint="stop_metric = 'accuracy'")
        self._patience, self._metric, self._since, self._best = patience, metric, 0, float("-inf")
        self._stopped = stopped
        if patience and metrics.exists():
            for line in metrics.read_text().splitlines():
                self.see(json.loads(line)["metrics"])

    def see(self, metrics: Mapping[str, float | int | None]) -> None:
        """Take the metrics of one more round; an aborted round has none, and counts for nothing."""
        if (value := metrics.get(self._metric)) is None:
            return
        self._since = 0 if value > self._best else self._since + 1
        self._best = max(self._best, value)

    @property
    def due(self) -> bool:
        """Whether the run ends here."""
        return self._stopped or (bool(self._patience) and self._since >= self._patience)
