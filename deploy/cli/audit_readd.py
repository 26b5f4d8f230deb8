"""``fedveil audit readd``: the members' signed ciphertexts added up again, where a server kept them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedveil.common.errors import UsageError, VerificationError
from fedveil.deploy.cli.audit_sign_compare import Pin, pinned


def readd(
    run: Annotated[Path, typer.Argument(help="The folder of a run whose server kept the ciphertexts.")],
    round: Annotated[int, typer.Option(min=0, help="Only this round. 0: all that opened a sum.")] = 0,
    consortium_key: Pin = None,
) -> None:
    """Add up the members' signed ciphertexts again and compare with the opened sums. Exit code 60 if one differs.

    The server keeps them with keep_ciphertexts = true in [run] of federation.toml. Delete RUN/ciphertexts after the
    audit: with the shares of T colluding helpers they could be opened one by one.
    """
    from fedveil.privacy.report.readd import readd as add_again

    if not run.is_dir():
        raise UsageError(f"{run} is not a folder", hint="give the folder of a run")
    wrong = 0
    for found in add_again(run, pinned(consortium_key), (round,) if round else ()):
        said = f"DIFFERS: {found.error}" if found.error else "the signed ciphertexts add up to the opened sum"
        line = f"round {found.round}, {found.members} members: {said}"
        typer.echo("".join(c if c.isprintable() else " " for c in line))
        wrong += bool(found.error)
    if wrong:
        raise VerificationError(
            f"the opened sums of {wrong} rounds are not those of the members' ciphertexts in {run}",
            hint="each line above says what differs; use no model that a differing round moved",
        )
