"""Which examples the property tests try.

The default suite must give one answer for one commit: its examples are derived from each test's own source. ``make
test-deep`` looks for what they miss: random examples, ``FEDVEIL_EXAMPLES`` times as many.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import is_hypothesis_test, settings

FACTOR = int(os.environ.get("FEDVEIL_EXAMPLES", "0"))

# Loaded before any test module is: the settings written there take over what they do not name.
settings.register_profile("same", derandomize=True, print_blob=True)
settings.register_profile("deep", derandomize=False, print_blob=True, deadline=None)
settings.load_profile("deep" if FACTOR else "same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Multiply the examples of every property test by ``FACTOR``."""
    if not FACTOR:
        return
    for function in {getattr(i, "function", None) for i in items}:
        if function is None or not is_hypothesis_test(function):
            continue
        here = function._hypothesis_internal_use_settings
        function._hypothesis_internal_use_settings = settings(here, max_examples=here.max_examples * FACTOR)
