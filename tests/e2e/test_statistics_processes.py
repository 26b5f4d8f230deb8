"""``fedveil stats`` as processes over loopback: first without the owners' consent, then with it."""

from __future__ import annotations

import json
from typing import Any

from fedveil.deploy.lab import demo_hospitals
from fedveil.deploy.lab.demo_hospitals import HOSPITALS

CONSENT = ("[limits]", '[limits]\ntasks = ["train", "stats"]')


def ask(c: Any, run: str, *more: str) -> None:
    """The server asks for statistics and every hospital answers."""
    c.run = c.home / run
    c.start("server", "stats", "federation.toml", "--run", str(c.run), "--epsilon", "0.5", *more)
    for site in HOSPITALS:
        c.site(site, "--wait", "3")


def test_asked_for_refused_and_granted(consortium: Any) -> None:
    c = consortium("stats", steps=2)
    ask(c, "refused", "--column", "bmi", "--what", "mean")
    assert c.code("server") == 90
    assert "task 'stats' is not among the tasks this site allows" in c.log("server")
    for site in HOSPITALS:
        c.code(site)
        assert "spend" not in {r.kind for r in c.ledger(site)}
        c.replace(c.home / site / "site.toml", CONSENT)

    ask(c, "granted", "--column", "bmi", "--column", "age", "--what", "histogram,quantiles", "--bins", "4")
    assert c.code("server") == 0, c.log("server")[-2000:]
    for site in HOSPITALS:
        assert c.code(site) == 0, c.log(site)[-2000:]
        assert c.charged(site) == [1]
    assert "quantile 0.5" in c.log("server")
    found = json.loads((c.run / "statistics.json").read_text())
    records = sum(map(len, demo_hospitals.split(0).hospitals))
    for name in ("bmi", "age"):
        h = found["columns"][name]["histogram"]
        assert abs(sum(h["noisy"]) - records) < 6 * h["standard_error"] * len(h["noisy"]) ** 0.5
    key = (c.home / "pki" / "server" / "consortium.pub").read_text().strip()
    c.start("audit", "audit", "verify", str(c.run / "report.json"), "--consortium-key", key)
    assert c.code("audit") == 0, c.log("audit")[-2000:]
