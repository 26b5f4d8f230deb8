"""How likely a released row is to be tied to a person, under three attackers. Local knowledge.

Prosecutor: knows that the person is in the table. Journalist: does not, but has a register of the population. Marketer:
wants as many matches as possible. Source: El Emam, Guide to the De-Identification of Personal Health Information, 2013;
Dankar, El Emam, PAIS 2010. These are figures about the declared quasi-identifiers and nothing else: whoever knows more
about a person, or wants to learn a sensitive value instead of a name, is not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import DataError, UsageError
from fedveil.privacy.anonymization.recoding import Recoding
from fedveil.privacy.anonymization.tuples import Tuples, distinct_tuples

Sizes = NDArray[np.int64]


@dataclass(frozen=True)
class Risk:
    """Probabilities in [0, 1].

    Attributes:
        prosecutor_highest: 1 / smallest class.
        prosecutor_average: mean over the rows of 1 / class size: classes / rows.
        at_risk: share of the rows whose prosecutor risk is above the threshold.
        journalist_highest: 1 / fewest population records that a class matches; the prosecutor's without a register.
        marketer: expected share of the rows tied to the right person.
        unique: share of the rows that are alone in their class.
    """

    prosecutor_highest: float
    prosecutor_average: float
    at_risk: float
    journalist_highest: float
    marketer: float
    unique: float


def assess(
    sizes: Sequence[int] | Sizes, *, population: Sequence[int] | Sizes | None = None, threshold: float = 0.2
) -> Risk:
    """Risk from class sizes.

    Args:
        sizes: (c,) rows of every class, positive.
        population: (c,) records of the population that every class matches, each at least the class's rows.
        threshold: the prosecutor risk that counts as too high.

    Raises:
        DataError: no class, an empty class, or fewer population records than rows.
        UsageError: a threshold outside [0, 1].
    """
    f = np.asarray(sizes, np.int64)
    if not 0 <= threshold <= 1:
        raise UsageError("the risk threshold is a probability in [0, 1]")
    if not len(f) or f.min() < 1:
        raise DataError("risk needs classes of one row at least")
    F = f if population is None else np.asarray(population, np.int64)
    if F.shape != f.shape or bool((f > F).any()):
        raise DataError("a class matches fewer population records than it has rows")
    n = int(f.sum())
    return Risk(
        float(1 / f.min()),
        len(f) / n,
        float(f[1 / f > threshold].sum() / n),
        float(1 / F.min()),
        float((f / F).sum() / n),
        float(f[f == 1].sum() / n),
    )


def released_risk(tuples: Tuples, found: Recoding, *, threshold: float = 0.2) -> Risk:
    """Risk of a recoding; with the population of k-map, if there is one."""
    kept = found.classes >= 0
    sizes = np.bincount(found.classes[kept], tuples.weights[kept], found.count).astype(np.int64)
    people = None
    if tuples.population is not None:
        people = np.bincount(found.classes[kept], tuples.population[kept], found.count).astype(np.int64)
        people = people[sizes > 0]
    return assess(sizes[sizes > 0], population=people, threshold=threshold)


def raw_risk(tuples: Tuples, *, threshold: float = 0.2) -> Risk:
    """Risk of the table as it came in: its ``unique`` is the sample uniqueness."""
    _, _, own = distinct_tuples(list(tuples.codes), tuples.count)
    sizes = np.bincount(own, tuples.weights).astype(np.int64)
    return assess(sizes[sizes > 0], threshold=threshold)
