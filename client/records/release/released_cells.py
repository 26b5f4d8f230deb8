"""What the contract says about the cells of a released table that no criterion looks at.

The criteria are about the quasi-identifiers and the sensitive values. A release also holds features and the target. A
name in a sensitive column, a number beyond its public bounds or a class that nobody agreed on passes all criteria. But
a table with such a cell is no release under the contract.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fedveil.common.contract import MISSING, Column, DataContract
from fedveil.common.errors import AnonymityError
from fedveil.privacy.anonymization.recoding import parse_set

pc: Any = pyarrow.compute  # its functions are made at import time, where type checkers cannot see them
BATCH = 1 << 18
HINT = "the file was changed, or made under another contract: anonymise the table again"


def require_cells(path: Path, contract: DataContract) -> None:
    """Refuse a released .csv or .parquet file with a cell that the contract does not allow.

    Labels of coded columns are the contract's, numbers are inside its public bounds, and a value is missing only where
    the contract says so. The verifier checks which labels a quasi-identifier may have. This checks only whether
    "missing" may be one of them.

    Raises:
        AnonymityError: it names the column and how many of its cells, and repeats none of them.
    """
    broken = {c.name: 0 for c in contract.loaded}
    try:
        for batch in _batches(path, contract):
            for c in contract.loaded:
                broken[c.name] += _broken(batch.column(c.name), c)
    except (OSError, KeyError, pa.ArrowException) as e:
        raise AnonymityError(f"{path} is not a readable release with the contract's columns", hint=HINT) from e
    said = [f"column {name!r}: {n} cells" for name, n in broken.items() if n]
    if said:
        raise AnonymityError(f"the released file breaks the contract: {'; '.join(said[:8])}", hint=HINT)


def _batches(path: Path, contract: DataContract) -> Iterator[Any]:
    names = [c.name for c in contract.loaded]
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH, columns=names)
        return
    text = dict.fromkeys(names, pa.string())
    yield from pacsv.open_csv(
        path, convert_options=pacsv.ConvertOptions(column_types=text, include_columns=names, null_values=[""],
                                                   strings_can_be_null=True, quoted_strings_can_be_null=True)
    )  # fmt: skip


def _broken(cells: Any, c: Column) -> int:
    """How many cells of a column the contract does not allow."""
    kind = cells.type.value_type if pa.types.is_dictionary(cells.type) else cells.type
    words = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if c.role != "quasi" and not c.coded:
        numbers = _numbers(cells) if words else cells.cast(pa.float64())
        return _outside(numbers, cells.is_valid(), c)
    if c.role != "quasi" and pa.types.is_integer(kind):  # a code, which has the same text in a CSV file
        cells, words = cells.cast(pa.string()), True
    if not words:
        return len(cells) if len(cells) != cells.null_count or c.missing == "error" else 0
    counted = pc.value_counts(cells.cast(pa.string())).to_pylist()
    return sum(v["counts"] for v in counted if not _allowed(v["values"], c))


def _allowed(word: str | None, c: Column) -> bool:
    if not word:
        return c.missing == "indicator"
    if c.role != "quasi":
        return word in c.labels
    return c.missing == "indicator" or word in c.labels or MISSING not in (parse_set(word) or ())


def _numbers(cells: Any) -> Any:
    """Texts as numbers; NaN for a text that is none."""
    text = cells.cast(pa.string())
    good = pc.match_substring_regex(text, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")
    return pc.if_else(good, text, "nan").cast(pa.float64())


def _outside(numbers: Any, present: Any, c: Column) -> int:
    x = np.asarray(pc.fill_null(numbers, np.nan).to_numpy(zero_copy_only=False))
    here = present.to_numpy(zero_copy_only=False)
    low, high = (-np.inf, np.inf) if c.low is None or c.high is None else (c.low, c.high)
    bad = here & ~((x >= low) & (x <= high))  # NaN is bad too
    return int(bad.sum()) + (int((~here).sum()) if c.missing == "error" else 0)
