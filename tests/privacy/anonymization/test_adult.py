"""The values that independent tools agree on for Adult, and the losses promised. Needs the data folder."""

import pyarrow.csv as pacsv
import pytest

from fedveil.privacy.anonymization.anonymizer import Anonymizer
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import KAnonymity

QUASI = ("age", "workclass", "education", "marital-status", "race", "sex", "native-country")
pytestmark = pytest.mark.data("adult_arx_30162.csv", "adult_hierarchies")


@pytest.fixture(scope="module")
def adult(data_folder):
    quasi = [
        QuasiIdentifier(q, Hierarchy.from_csv(data_folder / "adult_hierarchies" / f"adult_hierarchy_{q}.csv", name=q))
        for q in QUASI
    ]
    table = pacsv.read_csv(data_folder / "adult_arx_30162.csv", parse_options=pacsv.ParseOptions(delimiter=";"))
    return table, TableSpec(tuple(quasi), (Sensitive("occupation"),), (), ("salary-class",))


def test_optimal_node_of_arx(adult):
    table, spec = adult
    a = Anonymizer(spec, [KAnonymity(5)], method="optimal", suppression_limit=0.05)
    a.fit_transform(table)
    assert a.outcome.node == (3, 1, 1, 0, 0, 0, 1)
    assert a.outcome.suppressed == 1458  # 4.83 %
    assert a.outcome.classes == 399


def test_losses(adult):
    table, spec = adult
    peel = Anonymizer(spec, [KAnonymity(5)], method="peel", suppression_limit=0.05)
    peel.fit_transform(table)
    assert peel.outcome.ncp <= 0.0300
    sets = Anonymizer(spec, [KAnonymity(5)], method="mondrian")
    sets.fit_transform(table)
    assert sets.outcome.ncp <= 0.0172
