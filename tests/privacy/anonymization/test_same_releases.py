"""What every method releases, recorded once: a change of how rows travel must change none of it but their order."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.privacy.anonymization.anonymizer import Anonymizer
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import DistinctL, KAnonymity, TCloseness
from fedveil.privacy.anonymization.stream import anonymize_parquet

AGES = [(str(v), f"[{v // 4 * 4},{v // 4 * 4 + 3}]", f"[{v // 16 * 16},{v // 16 * 16 + 15}]", "*") for v in range(64)]
SPEC = TableSpec(
    (
        QuasiIdentifier("age", Hierarchy.from_rows(AGES), fixed_level=1),
        QuasiIdentifier("city", fixed_level=0),
    ),
    (Sensitive("ill"), Sensitive("cost")),
    ("name",),
    ("row", "note", "kind"),
)
K, L, T = KAnonymity(5), DistinctL(2, "ill"), TCloseness(0.5, "ill")
# By method, criteria and share that may be suppressed: digests of the table in memory, and of the Parquet file.
RECORDED = {
    "fixed": ("15e46baa895f69eb", "e20b5cc2dff04414", 66, 79, (1, 0)),
    "fixed l": ("019ca878925d19bb", "598431d2fcd60747", 404, 33, (1, 0)),
    "mondrian": ("58e9dfd797e926df", "d687464dac39f4f8", 0, 108, None),
    "mondrian l t": ("da6305e3066ef841", "c639a4481eac1afc", 0, 105, None),
    "optimal": ("04a6514da7ad576e", "d1192e94cd713cbf", 71, 78, (1, 0)),
    "peel": ("14968280a62afeba", "5f49e82c3ee0c4d1", 0, 121, None),
    "auto": ("1511ee7774eb2ae1", "e9818d46df204277", 0, 160, None),
}


def table(n=900):
    i = np.arange(n)
    ages = pa.array(i * 37 % 61 * (i * 11 % 7) % 64, mask=i % 53 == 5)
    return pa.table(
        {
            "name": [f"p{x}" for x in i],
            "age": ages,
            "city": pa.array([f"c{x * x % 13 % 7}" for x in i.tolist()]),
            "ill": pa.array([None if x % 97 == 3 else f"i{x * x % 31 % 5}" for x in i.tolist()]),
            "cost": pa.array((i * i % 17) / 4),
            "row": i,
            "note": [f"text {x}" for x in i],
            "kind": pa.array([f"k{x % 5}" for x in i]).dictionary_encode(),
        }
    )


def digest(t):
    """Of the columns' names and types, and of the rows in sorted order."""
    lines = sorted(map(repr, (tuple(row.values()) for row in t.to_pylist())))
    return hashlib.sha256("\n".join([str(t.schema.remove_metadata()), *lines]).encode()).hexdigest()[:16]


CASES = {
    "fixed": ([K], "fixed", 0.3),
    "fixed l": ([K, DistinctL(5, "ill")], "fixed", 0.9),
    "mondrian": ([K], "mondrian", 0.0),
    "mondrian l t": ([K, L, T], "mondrian", 0.0),
    "optimal": ([K, T], "optimal", 0.3),
    "peel": ([K, L], "peel", 0.1),
    "auto": ([KAnonymity(3)], "auto", 0.05),
}


@pytest.mark.parametrize("case", CASES)
def test_the_release_is_the_recorded_one(tmp_path, case):
    models, method, limit = CASES[case]
    a = Anonymizer(SPEC, models, method=method, suppression_limit=limit)
    released = a.fit_transform(table())
    pq.write_table(table(), tmp_path / "in.parquet")
    out = tmp_path / "out.parquet"
    done = anonymize_parquet(tmp_path / "in.parquet", out, SPEC, models, method=method, suppression_limit=limit)
    assert done.outcome == a.outcome
    o = a.outcome
    found = (digest(released), digest(pq.read_table(out)), o.suppressed, o.classes, o.node)
    assert found == RECORDED[case], (case, found)
