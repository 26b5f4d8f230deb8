"""What a person sees while a run is under way, and when it has ended."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

CONSOLE = Console(soft_wrap=True)


class Display:
    """A progress bar over rounds: ε of those opened (no site is charged more), the public metric and bytes so far.

    It is shown from the first event on. A run that is refused before that leaves no bar on the terminal.
    """

    def __init__(self, title: str, steps: int | None = None) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=CONSOLE,
        )
        self._bytes = 0
        self._task = self._progress.add_task(title, total=steps, facts="waiting for the sites")

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def progress(self, kind: str, facts: dict[str, Any]) -> None:
        """Told of the run's events."""
        self._progress.start()
        if kind == "plan":
            for warning in facts["warnings"]:
                self._progress.console.print("[bold yellow]warning:[/]", escape(warning), highlight=False)
        elif kind == "joined":
            self._progress.update(self._task, facts=f"{len(facts['sites'])} sites signed the plan")
        elif kind == "round":
            metrics = "  ".join(f"{k} {v:.3f}" for k, v in facts["metrics"].items())
            self._bytes += facts["bytes_sent"] + facts["bytes_received"]
            text = f"ε ≤ {facts['epsilon_opened']:.3f}  {metrics}  {self._bytes / 1e6:.1f} MB"
            self._progress.update(self._task, completed=facts["round"], facts=text)
        elif kind == "stopping":
            self._progress.console.print("stopping after this round; a second time: at once", highlight=False)
        elif kind == "aborted":
            self._progress.console.print(
                f"round {facts['round']} aborted (charged where a site answered): {facts['reason']}", highlight=False
            )

    def count(self, done: int, facts: str) -> None:
        """Anything else that is counted."""
        self._progress.start()
        self._progress.update(self._task, completed=done, facts=facts)
