"""The sentences of a report: a pure function of its numbers and the catalogue, so that a verifier can write them again.

The signed report holds them in English. A page in another language says the same by the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from fedveil.privacy.planning import HIGH_EPSILON
from fedveil.privacy.report.catalogue import Speaker, messages
from fedveil.privacy.report.results import empirical
from fedveil.privacy.report.witnesses import peers_at

NAMED = 8  # sites, and groups of sites, that one sentence names
SPOKEN_RATES = (0.01, 0.1)  # false alarms for which the attack sentence states the members found


def words(p: Mapping[str, Any], say: Speaker) -> dict[str, Any]:
    """Every sentence of a payload, by name; ``p`` needs no sentence in it, only numbers."""
    w = _Words(p, say)
    return {
        "notice": notice(p, say),
        "claim": w.claim(),
        "replace_one": w.replace_one(),
        "fallback": w.fallback(),
        "attack": w.attack(),
        "protects": say(f"protects.{w.kind}"),
        "against": w.against(),
        "mechanism": say(f"mechanism.{'stats' if w.stats else 'train'}"),
        "sampling": say(f"sampling.{'poisson' if w.q < 1 else 'all'}"),
        "claim_by": say("accounting.claim_by", interval=f"{p['accounting']['interval']:g}"),
        "second": say("accounting.second"),
        "across_runs": say("accounting.across_runs"),
        "tuning": w.tuning(),
        "public_data": w.public_data(),
        "covered": w.covered(),
        "not_covered": w.not_covered(),
        "deviations": w.deviations(),
        "audit": empirical(p["audit"], say),
    }


def notice(p: Mapping[str, Any], say: Speaker) -> str:
    """The first line of everything about a run that protected nobody; empty for every other run."""
    if p.get("not_private"):
        return say("notice.not_private")
    return say("notice.simulated") if p["simulated"] else ""


def kind(p: Mapping[str, Any]) -> str:
    """What ε speaks of, as the catalogue's keys name it: ``record``, ``person`` or ``client``.

    The one place that chooses every word about it. A payload that names something else does not verify; it is shown in
    the words for a record.
    """
    said = str(p["claim"]["unit"])
    return said if f"unit.{said}" in messages() else "record"


def insert(p: dict[str, Any], say: Speaker) -> dict[str, Any]:
    """The payload with its sentences where its readers look for them."""
    w = words(p, say)
    claim = {k: w[n] for k, n in (
        ("sentence", "claim"), ("replace_one_sentence", "replace_one"), ("fallback_sentence", "fallback"),
        ("attack_sentence", "attack"),
    )}  # fmt: skip
    return {
        **p,
        "notice": w["notice"],
        "claim": p["claim"] | claim,
        "trust": p["trust"] | {"protects": w["protects"], "against": w["against"]},
        "mechanism": p["mechanism"] | {"name": w["mechanism"], "sampling": w["sampling"]},
        "accounting": p["accounting"] | {k: w[k] for k in ("claim_by", "second", "across_runs")},
        "tuning": p["tuning"] | {"sentence": w["tuning"]},
        **{k: w[k] for k in ("public_data", "covered", "not_covered", "deviations")},
    }


class _Words:
    def __init__(self, p: Mapping[str, Any], say: Speaker) -> None:
        trust, claim, mechanism = p["trust"], p["claim"], p["mechanism"]
        self.p, self.say = p, say
        self.kind = kind(p)
        self.mode, self.sum, self.t = str(trust["mode"]), str(trust["sum"]), int(trust["colluders"])
        self.stats = trust["task"] == "stats"
        self.q = float(mechanism["sample_rate"])
        self.epsilon, self.delta = f"{claim['epsilon']:.4g}", f"{claim['delta']:g}"
        self.share = f"{mechanism['share_std_in_grid_units']:.0f}"

    @cached_property
    def unit(self) -> str:
        return self.say(f"unit.{self.kind}")

    @cached_property
    def units(self) -> str:
        return self.say(f"units.{self.kind}")

    @cached_property
    def result(self) -> str:
        return self.say(f"result.{'stats' if self.stats else 'train'}")

    @cached_property
    def others(self) -> str:
        return self.say("others.one") if self.t <= 1 else self.say("others.many", t=self.t)

    def claim(self) -> str:
        if self.mode == "local":
            key = "local"
        elif self.sum == "plain":
            key = "plain"
        elif self.sum == "sharedkey":
            key = "sharedkey" if self.t else "sharedkey_alone"
        else:
            # A site that takes part knows its own share of the noise: with t = 0 nothing is claimed against it.
            key = "keysum" if self.t else "keysum_alone"
        return self.say(
            f"claim.{key}",
            result=self.result, unit=self.unit, others=self.others, epsilon=self.epsilon, delta=self.delta,
        )  # fmt: skip

    def against(self) -> list[str]:
        say = self.say
        receiver = say(f"against.receiver_{'stats' if self.stats else 'train'}")
        if self.mode == "local":
            return [say("against.server"), say("against.all_sites"), receiver, say("against.outsiders")]
        if self.sum == "plain":
            return [say("against.nobody"), receiver]
        if self.sum == "sharedkey":
            others = [say("against.others_without", others=self.others)] if self.t else []
            return [say("against.server_alone"), *others, receiver, say("against.outsiders")]
        others = [say("against.others_with", others=self.others)] if self.t else []
        return [say("against.server"), *others, receiver, say("against.outsiders")]

    def fallback(self) -> str:
        if self.mode == "local":
            return self.say("fallback.none")
        epsilon = f"{self.p['claim']['fallback_epsilon']:.4g}"
        return self.say("fallback.own_share", epsilon=epsilon, units=self.units)

    def replace_one(self) -> str:
        epsilon = f"{self.p['claim']['replace_one_epsilon']:.4g}"
        return self.say("claim.replace_one", unit=self.unit, epsilon=epsilon)

    def attack(self) -> str:
        rates = [(r["false_positive_rate"], r["true_positive_rate"]) for r in self.p["claim"]["attack"]]
        parts = [
            self.say("attack.at", alarms=f"{100 * f:g}", found=f"{100 * t:.1f}") for f, t in rates if f in SPOKEN_RATES
        ]
        return self.say("attack.sentence", rates=self.say("attack.join").join(parts))

    def tuning(self) -> str:
        n = max(self.p["tuning"]["earlier_sessions"].values(), default=0)
        return self.say("tuning.some", n=n) if n else self.say("tuning.none")

    def public_data(self) -> list[str]:
        say = self.say
        shared = [say("public.contract"), say("public.records", n=self.p["mechanism"]["records_declared"])]
        own = ["statistics"] if self.stats else ["weights", "table"]
        return [*shared, *(say(f"public.{x}") for x in own)]

    def covered(self) -> list[str]:
        steps, h = self.p["steps"]["planned"], self.p["trust"]["honest"]
        return [
            self.say("covered.steps", steps=steps, h=h),
            self.say(f"covered.{'statistics' if self.stats else 'models'}"),
            self.say("covered.adjacency", unit=self.unit),
        ]

    def not_covered(self) -> list[str]:
        say, measured = self.say, bool((self.p["audit"] or {}).get("conformance"))
        out = [
            say(f"groups.{self.kind}"),
            say("open.metadata"),
            say("open.bits"),
            say("open.timing"),
            say("open.poisoning"),
            say("open.noise_measured" if measured else "open.noise"),
            say("open.server"),
            say("open.inference", result=self.result),
        ]
        if unseen := self._unwitnessed():
            out.append(unseen)
        if missing := self.p["ledgers_missing"]:
            out.insert(0, say("open.ledgers", sites=say("list.join").join(missing)))
        if lost := [name for name, s in self.p["sites"].items() if s and s.get("lost_ledgers")]:
            out.insert(0, say("open.lost_ledgers", sites=say("list.join").join(lost)))
        if others := self.p.get("other_ledgers"):
            out.insert(0, say("open.other_ledgers", sites=say("list.join").join(others)))
        return out

    def _unwitnessed(self) -> str:
        """The ledgers whose last rows too few members hold, those alike together."""
        say, needed = self.say, self.p["witnesses"]["needed"]
        groups: dict[tuple[int, int, int], list[str]] = {}
        for site, w in self.p["witnesses"]["ledgers"].items():
            if (peers := peers_at(w["held"], w["rows"])) < needed:
                groups.setdefault((w["witnessed"], w["rows"], peers), []).append(site)
        if not groups:
            return ""
        parts = list[str]()
        for (rows, of, peers), names in [*groups.items()][:NAMED]:
            sites = say("list.join").join([*names[:NAMED], *["…"] * (len(names) > NAMED)])
            parts.append(say("open.witnessed_rows", sites=sites, rows=rows, of=of, peers=peers, needed=needed))
        more = ["…"] if len(groups) > NAMED else []
        return say("open.unwitnessed", needed=needed, ledgers=say("attack.join").join(parts + more))

    def deviations(self) -> list[str]:
        say = self.say
        out = [say("deviation.discrete", share=self.share), say("deviation.tail"), say("deviation.float")]
        other = [name for name, s in self.p["sites"].items() if s and s["delta"] != self.p["claim"]["delta"]]
        if other:
            out.append(say("deviation.ledger_delta", sites=say("list.join").join(other), delta=self.delta))
        if self.q < 1:
            out.append(say("deviation.poisson"))
        if self.sum in ("keysum", "sharedkey", "none", "plain"):
            out.append(say(f"deviation.{self.sum}"))
        if self.p["claim"]["epsilon_planned"] > HIGH_EPSILON:
            out.append(say("deviation.high_epsilon", epsilon=self.epsilon, high=f"{HIGH_EPSILON:g}"))
        if self.mode == "client" and self.p["plan"]["few_clients"]:
            out.append(say("deviation.few_clients"))
        if said := notice(self.p, say):
            out.insert(0, said)
        return out
