"""The demo's consortium: four hospitals out of scikit-learn's bundled diabetes records, in raw units.

Efron, Hastie, Johnstone & Tibshirani, "Least Angle Regression" (2004): 442 patients, ten measurements, disease
progression after one year. A quarter is declared public and belongs to no hospital.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedveil.client.records.release import encode
from fedveil.common import contract as contracts
from fedveil.common import identity
from fedveil.common.contract import DataContract
from fedveil.deploy.enrol.provision import make_consortium
from fedveil.privacy.anonymization import fixed

HOSPITALS = ("hospital-east", "hospital-north", "hospital-south", "hospital-west")
# Public bounds in the measurements' units; chosen from what the quantities can be, not fitted.
_BOUNDS = {
    "bmi": (14, 46, "kg/m2"),
    "bp": (50, 150, "mmHg"),
    "s1": (80, 320, "total cholesterol, mg/dl"),
    "s2": (30, 260, "low-density lipoproteins, mg/dl"),
    "s3": (15, 105, "high-density lipoproteins, mg/dl"),
    "s4": (1, 10, "total cholesterol / HDL"),
    "s5": (3, 6.5, "log of serum triglycerides"),
    "s6": (50, 130, "blood sugar, mg/dl"),
}
_COLUMNS = ("age", "sex", *_BOUNDS, "progression")
_MEDIAN = 140.5


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters chosen on splits with seeds from 100 up."""

    steps: int
    clip: float
    learning_rate: float
    momentum: float


FEDERATED = Recipe(20, 0.5, 1.0, 0.9)
LOCAL = Recipe(40, 1.0, 1.0, 0.0)
ALONE = Recipe(40, 0.5, 2.0, 0.0)
POOLED = Recipe(100, 50.0, 1.0, 0.9)
EPSILON, DELTA, CAP = 1.0, 1e-5, 1.1
ENGINE = "opacus"  # of clipping, at every hospital


def contract() -> DataContract:
    """The agreement: roles, bounds, the fixed recoding of age and sex, k = 5 and l = 2."""
    columns = [
        {"name": "age", "role": "quasi", "type": "number", "unit": "years", "low": 18, "high": 80, "levels": [50]},
        {"name": "sex", "role": "quasi", "type": "category", "values": ["1", "2"], "levels": [["1"], ["2"]]},
        *(
            {"name": n, "role": "feature", "type": "number", "low": a, "high": b, "unit": u}
            for n, (a, b, u) in _BOUNDS.items()
        ),
        {
            "name": "progression",
            "role": "target",
            "type": "number",
            "low": 0,
            "high": 400,
            "threshold": _MEDIAN,
            "unit": "disease progression after one year",
        },
    ]
    return DataContract.model_validate(
        {
            "name": "diabetes-progression",
            "version": "1",
            "purpose": "predict whether the disease progresses faster than the median",
            "unit": "one row is one patient",
            "k": 5,
            "l": 2,
            "sensitive_target": True,
            "columns": columns,
        }
    )


@dataclass(frozen=True)
class Split:
    """Row indices: one array for each hospital, and the public quarter."""

    hospitals: list[NDArray[np.int64]]
    public: NDArray[np.int64]


def records() -> NDArray[np.float64]:
    """``(442, 11)``: the columns of the contract, raw units."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    return np.column_stack([bunch["data"], bunch["target"]])


def split(seed: int) -> Split:
    """A random public quarter and four hospitals of (nearly) equal size; a public seed, for repeatability."""
    order = np.random.default_rng(seed).permutation(442)  # noqa: TID251
    return Split(np.array_split(order[111:], len(HOSPITALS)), order[:111])


def encoded(values: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All records as features and classes, by the code the sites use."""
    agreed = contract()
    columns: dict[str, NDArray[np.float64] | NDArray[np.object_]] = {
        name: values[:, i] for i, name in enumerate(_COLUMNS)
    }
    columns["sex"] = np.array([f"{v:g}" for v in values[:, 1]], dtype=object)
    return encode.encode(fixed.recode(columns, len(values), agreed).table, agreed)


def lay_out(folder: Path, port: int, seed: int) -> None:
    """Everything a consortium would have before its first run: keys, contract, settings, each hospital's table."""
    roster = make_consortium(folder / "pki", HOSPITALS, consortium="diabetes-demo", host="127.0.0.1")
    key = identity.load_signing_key(folder / "pki" / "consortium" / "consortium.key")
    signed = contracts.sign_contract(contract(), key)
    (folder / "contract.json").write_text(json.dumps(signed, indent=1))
    values, parts = records(), split(seed)
    _write_csv(folder / "public.csv", values[parts.public])
    for member, rows in zip(roster.sites, parts.hospitals, strict=True):
        home = folder / member.site
        home.mkdir()
        _write_csv(home / "patients.csv", values[rows])
        (home / "site.toml").write_text(_site_toml(member.site, port))
    (folder / "federation.toml").write_text(_federation_toml(port, sum(map(len, parts.hospitals))))


def _write_csv(path: Path, rows: NDArray[np.float64]) -> None:
    lines: Iterable[str] = (",".join(f"{v:.6g}" for v in row) for row in rows)
    path.write_text("\n".join([",".join(_COLUMNS), *lines]) + "\n")


def _site_toml(site: str, port: int) -> str:
    return f"""\
[site]
id = "{site}"
server = "127.0.0.1:{port}"
identity = "../pki/sites/{site}"
contract = "../contract.json"
data = "patients.csv"
lineage = "diabetes-{site}"
capacity = 128

[limits]                      # this hospital's own; no server can lift them
max_epsilon = {CAP}             # over all runs, by the RDP filter
delta = {DELTA}
min_noise_multiplier = 5.0

[training]
engine = "{ENGINE}"

[egress]
slot = 0.02                   # seconds; a step takes a few milliseconds here
"""


def _federation_toml(port: int, declared: int) -> str:
    r = FEDERATED
    return f"""\
[federation]
name = "diabetes-demo"
address = "127.0.0.1:{port}"
identity = "pki/server"
contract = "contract.json"
public_test = "public.csv"

[privacy]
mode = "distributed"
sum = "keysum"
epsilon = {EPSILON}
delta = {DELTA}
records = {declared}                 # declared in public, not counted
steps = {r.steps}
clip = {r.clip}

[model]
name = "logistic"

[optimizer]
learning_rate = {r.learning_rate}
momentum = {r.momentum}

[run]
join_timeout = 60
grace = 5
round_timeout = 30
"""
