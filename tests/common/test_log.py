"""The program's own lines are seen whatever the libraries that it imports have done to logging."""

import subprocess
import sys
from pathlib import Path

import pytest

import fedveil

ROOMS = Path(fedveil.__file__).parent
SAYS = (
    "{before}from fedveil.common import log; log.to_stderr(); log.to_stderr(); import logging; logging.basicConfig();"
    "logging.getLogger('fedveil.client').info('seen'); logging.getLogger('fedveil.client').debug('unseen');"
    "logging.getLogger('library').info('foreign'); logging.getLogger('library').warning('warned')"
)


BEFORE = ("", "import logging; logging.basicConfig(); ", "import fedveil.deploy.site_process; ")


@pytest.mark.parametrize("before", BEFORE)
def test_info_is_shown_once_after_any_import(before):
    command = [sys.executable, "-c", SAYS.format(before=before)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [x.split(" ", 2)[2] for x in lines] == ["fedveil.client INFO seen", "library WARNING warned"]


def test_no_entry_point_sets_up_logging_by_itself():
    """``basicConfig`` does nothing after an import that has set up a handler: what it should show is lost."""
    sources = [p for room in ROOMS.iterdir() if room.is_dir() for p in room.resolve().rglob("*.py")]
    assert len(sources) > 100
    assert [p.name for p in sources if "logging.basicConfig(" in p.read_text()] == []
