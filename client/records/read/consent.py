"""Which rows may be used at all: consent to the contract's purpose, and retention.

Both look at one row at a time. If one record of the source is added or removed, so is at most one row (factor 1).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from fedveil.client.records.read import values
from fedveil.common.contract import DataContract
from fedveil.common.contract.dates import EPOCH

pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them


@dataclass
class Usable:
    """How many rows were left out, and why. A row without consent is not looked at any further."""

    refused: int = 0
    expired: int = 0
    undated: int = 0


def usable_rows(
    texts: Mapping[str, pa.Array], contract: DataContract, today: dt.date, seen: Usable
) -> NDArray[np.bool_] | None:
    """Mask of the rows that may be used; None when the contract asks for neither consent nor retention.

    A row without a readable date counts as past its retention: an unknown age is not a permission.
    """
    mask = None
    if contract.consent is not None:
        granted = pc.is_in(texts[contract.consent.column], value_set=pa.array(contract.consent.granted, pa.string()))
        mask = granted.to_numpy(zero_copy_only=False)
        seen.refused += int((~mask).sum())
    if contract.retention is not None:
        name = contract.retention.column
        column = next(c for c in contract.columns if c.name == name)
        days = values.numbers(texts[name], column, values.Decimals(), values.Reading())
        mask = np.ones(len(days), bool) if mask is None else mask
        undated = mask & np.isnan(days)
        old = mask & (days < (today - EPOCH).days - contract.retention.days)
        seen.undated += int(undated.sum())
        seen.expired += int(old.sum())
        mask = mask & ~undated & ~old
    return mask
