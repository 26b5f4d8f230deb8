"""``fedveil simulate`` refuses an argument out of range: the hint names the range, and no progress bar is shown."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fedveil.common import cli
from fedveil.common.errors import PlanError, UsageError


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        (("--clients", 0), "1 to 1437"),
        (("--clients", 5000), "1 to 1437"),
        (("--clients", 10001, "--dataset", "trivial"), "1 to 10000"),
        (("--drop-rate", 2), "from 0 to 1"),
        (("--cap", 0), "above 0"),
        (("--by", "dirichlet:0"), "above 0"),
        (("--seed", -1), "0 to 4294967295"),
        (("--epsilon", -1), ""),
    ],
)
def test_a_refusal_names_the_allowed_range_and_leaves_no_progress_bar(tmp_path, capfd, given, allowed):
    done = CliRunner().invoke(cli.build(), ["simulate", *map(str, given), "--out", str(tmp_path / "run")])
    assert isinstance(done.exception, UsageError if allowed else PlanError)
    assert allowed in done.exception.hint
    assert done.output == ""
    assert capfd.readouterr().out == ""  # the bar goes to the console itself
