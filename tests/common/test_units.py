"""Numbers with a meaning, and the bounds inside which they have one."""

from __future__ import annotations

import pytest

from fedveil.common import units
from fedveil.common.errors import ConfigError


@pytest.mark.parametrize("name", ["a", "0", "site-1", "a-b-c", "a" * 64, "0-0"])
def test_site_ids(name) -> None:
    assert units.site_id(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", "A", "a b", "a_b", "a.b", "../etc", "a/b", "a" * 65, "a\n", "\na", "é", "ａ", "a\0", "-", "٣"],
)
def test_names_that_could_be_mistaken_are_refused(name) -> None:
    with pytest.raises(ConfigError, match="site id") as e:
        units.site_id(name)
    assert len(e.value.message) < 200


def test_a_long_name_is_not_repeated_in_full() -> None:
    with pytest.raises(ConfigError) as e:
        units.site_id("x" * 100_000)
    assert len(str(e.value)) < 300
