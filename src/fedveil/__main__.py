"""``python -m fedveil``: the command line."""

from fedveil.common.cli import main

main()
