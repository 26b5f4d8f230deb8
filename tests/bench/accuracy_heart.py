"""The heart records of four hospitals, by a data contract: public bounds, missing codes, nothing fitted to the data.

UCI Heart Disease (Janosi, Steinbrunn, Pfisterer, Detrano; CC BY 4.0), 920 patients. The file is not part of the
project; the bench looks for it in the folder that ``FEDVEIL_DATA`` names, or in ``../shared/data``.
"""

from __future__ import annotations

import csv
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from fedveil.client.records.judge import quality
from fedveil.client.records.read import sources
from fedveil.client.records.release import encode
from fedveil.common.contract import DataContract
from fedveil.deploy.lab.baselines import Table
from fedveil.privacy.anonymization import fixed

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
# What the quantities can be, in their units; a zero pressure or cholesterol is nobody's: it stands for "not measured".
_NUMBERS = {
    "age": (18, 100, "years", ("?",)),
    "trestbps": (50, 250, "resting blood pressure, mmHg", ("?", "0")),
    "chol": (50, 700, "serum cholesterol, mg/dl", ("?", "0")),
    "thalach": (50, 230, "highest heart rate, 1/min", ("?",)),
    "oldpeak": (-5, 10, "ST depression by exercise, mm", ("?",)),
    "ca": (0, 3, "major vessels coloured by fluoroscopy", ("?",)),
}
_CATEGORIES = {
    "sex": ("0", "1"),
    "cp": ("1", "2", "3", "4"),
    "fbs": ("0", "1"),
    "restecg": ("0", "1", "2"),
    "exang": ("0", "1"),
    "slope": ("1", "2", "3"),
    "thal": ("3", "6", "7"),
}
_ALWAYS = ("age", "sex", "cp")


def contract() -> DataContract:
    """Thirteen columns, all features, an indicator wherever a value may be missing; the target is ``num > 0``."""
    columns = [
        *(
            {"name": n, "role": "feature", "type": "number", "low": a, "high": b, "unit": u, "missing_codes": codes}
            | _missing(n)
            for n, (a, b, u, codes) in _NUMBERS.items()
        ),
        *(
            {"name": n, "role": "feature", "type": "category", "values": v, "missing_codes": ("?",)} | _missing(n)
            for n, v in _CATEGORIES.items()
        ),
        {"name": "num", "role": "target", "type": "number", "low": 0, "high": 4, "threshold": 0},
        {"name": "hospital", "role": "drop"},
    ]
    return DataContract.model_validate(
        {
            "name": "heart-disease", "version": "1", "purpose": "compare federations on public records",
            "unit": "one row is one patient", "k": 2, "columns": columns,
        }
    )  # fmt: skip


def _missing(name: str) -> dict[str, str]:
    return {"missing": "error" if name in _ALWAYS else "indicator"}


@dataclass(frozen=True)
class Heart:
    """Encoded records.

    Attributes:
        X, y: ``(920, width)`` float32 in [-1, 1] and ``(920,)`` int64, 1 for disease.
        hospital: ``(920,)`` index into :data:`HOSPITALS`.
    """

    X: NDArray[np.float32]
    y: NDArray[np.int64]
    hospital: NDArray[np.int64]

    def split(self, seed: int) -> tuple[list[Table], list[Table]]:
        """Per hospital, three quarters to train on and a quarter to test on, stratified by class; public seed."""
        train, test = [], []
        for i in range(len(HOSPITALS)):
            rows = np.flatnonzero(self.hospital == i)
            a, b = train_test_split(rows, test_size=0.25, random_state=seed, stratify=self.y[rows])
            train.append(Table(self.X[a], self.y[a]))
            test.append(Table(self.X[b], self.y[b]))
        return train, test


def path() -> Path:
    """Where the file is looked for."""
    folder = os.environ.get("FEDVEIL_DATA") or Path(__file__).parents[3] / "shared" / "data"
    return Path(folder) / "heart_4hospitals.csv"


def load(file: Path) -> Heart:
    """Read, check against the contract and encode, by the code that a site runs.

    The four hospitals wrote codes as "1" and "1.0"; both become "1" first.
    """
    with file.open(newline="") as f:
        rows = list(csv.DictReader(f))
    agreed = contract()
    with tempfile.TemporaryDirectory() as scratch:
        tidy = Path(scratch) / "heart.csv"
        with tidy.open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: _plain(v) for k, v in r.items()} for r in rows)
        raw = sources.read(tidy, agreed)
    quality.assess(raw, agreed).require()
    X, y = encode.encode(fixed.recode(raw.columns, raw.rows, agreed).table, agreed)
    return Heart(X, y, np.array([HOSPITALS.index(r["hospital"]) for r in rows]))


def _plain(text: str) -> str:
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
