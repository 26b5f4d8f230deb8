"""The Flower ServerApp: one function around the strategy."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedveil.server.job import Job
from fedveil.server.strategy import SecureSumStrategy


def make_app(job: Job) -> tuple[ServerApp, SecureSumStrategy]:
    """The app that runs ``job``, and its strategy, whose ``status`` can be read afterwards."""
    app = ServerApp()
    strategy = SecureSumStrategy(job)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            strategy.start(grid)
        finally:
            job.journal.close()

    return app, strategy
