"""``metrics.jsonl`` against the server's journal and the verifier's own accountant.

After a round the server states the ε of :func:`priced` rounds: of a few more, after many. So an ε, which takes an
accountant tens of milliseconds, is computed seldom, and what is shown is never too low.
"""

from __future__ import annotations

import math
from typing import Any

from fedveil.common.errors import VerificationError
from fedveil.privacy.report import recompute
from fedveil.privacy.report.history import History
from fedveil.privacy.report.prices import Prices

_CLOSE, _SAME, _UNEVEN = 1e-6, 1e-4, 0.01
_ALL = 16  # up to so many rounds, every ε is computed again; of more, some


def priced(number: int, steps: int) -> int:
    """The number of rounds whose ε is stated after round ``number`` of a plan of ``steps``.

    The next one that four binary digits can tell: ``number`` itself up to 16, above it at most an eighth more.
    """
    coarse = 1 << max(0, number.bit_length() - 4)
    return min(-(-number // coarse) * coarse, max(steps, number))


def metrics(rows: list[dict[str, Any]], plan: Prices, history: History) -> str:
    """Rounds in order; ε of the rounds opened (:func:`priced`) never falls, and is right where it is computed again.

    A site that refused a round may have been charged less, but never more.

    The accuracies are the server's word, but those of the last applied round are those that the run ended with.

    Raises:
        VerificationError: naming the round.
    """
    numbers = [r["round"] for r in rows]
    if numbers != sorted(set(numbers)) or (numbers and numbers[-1] > len(history.rounds)):
        raise VerificationError("its rounds are not those of the server's journal, in order")
    every = 1 if len(rows) <= _ALL else max(1, len(rows) // 8)
    sampled = {*range(0, len(rows), every), len(rows) - 1} if rows else set()
    most = 0.0
    for i, row in enumerate(rows):
        stated = own = row["epsilon_opened"]
        if i in sampled:
            steps = priced(row["round"], plan.steps)
            own = recompute.by_pld(plan.rate, plan.noise, steps, plan.left(steps))
        if abs(stated - own) > _CLOSE * max(1.0, own):
            raise VerificationError(f"round {row['round']}: it states epsilon = {stated:.6f}, not {own:.6f}")
        # What is not computed again lies between two rounds that are; at a small δ a composition's rounding shows.
        if stated < most * (1 - _UNEVEN) - _CLOSE:
            raise VerificationError(f"round {row['round']}: the epsilon that it states is less than in a round before")
        most = max(most, stated)
    last = history.applied[-1].number if history.applied else 0
    shown = next((r["metrics"] for r in reversed(rows) if r["round"] == last), {})
    if shown:
        _same_results(shown, history.ended.metrics, last)
    return f"{len(rows)} rows, {len(sampled)} recomputed"


def _same_results(shown: dict[str, float], ended: dict[str, float], last: int) -> None:
    for name in sorted({*shown, *ended}):
        if name not in shown or name not in ended or not math.isclose(shown[name], ended[name], rel_tol=_SAME):
            raise VerificationError(
                f"the run's end states {name[:64]} = {ended.get(name)}, after round {last} it was {shown.get(name)}"
            )
