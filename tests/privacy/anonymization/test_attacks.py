"""What k, l and t do not promise, as attacks that work. The figures are those of docs/anonymity-limits.md."""

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa

from fedveil.privacy.anonymization.anonymizer import Anonymizer
from fedveil.privacy.anonymization.attributes import Hierarchy, QuasiIdentifier, Sensitive, TableSpec
from fedveil.privacy.anonymization.criteria import DistinctL, KAnonymity, TCloseness

# Machanavajjhala et al. 2007, Figures 1 and 2: twelve in-patients and their 4-anonymous release.
PATIENTS = [("130**", "<30", c) for c in ("heart", "heart", "viral", "viral")]
PATIENTS += [("1485*", ">=40", c) for c in ("cancer", "heart", "viral", "viral")]
PATIENTS += [("130**", "3*", "cancer")] * 4


def classes_of(rows):
    out = defaultdict(Counter)
    for *labels, secret in rows:
        out[tuple(labels)][secret] += 1
    return out


def test_homogeneity():
    """Four-anonymous, and a neighbour aged 31 in 13053 is known to have cancer."""
    own = classes_of(PATIENTS)["130**", "3*"]
    assert own.total() == 4
    assert set(own) == {"cancer"}


def test_background_knowledge():
    """A person under 30 has heart disease or a viral infection; knowing that the first is rare for her settles it."""
    own = classes_of(PATIENTS)["130**", "<30"]
    assert set(own) - {"heart"} == {"viral"}


def test_skewness():
    """2-diverse, and yet a class raises the odds of a rare disease from 1 % to 50 %; t-closeness sees it."""
    rows = pa.table({"q": [0, 0] + [1] * 198, "ill": ["rare", "no"] + ["rare"] + ["no"] * 197})
    spec = TableSpec((QuasiIdentifier("q"),), (Sensitive("ill"),))
    diverse = Anonymizer(spec, [KAnonymity(2), DistinctL(2)], method="mondrian").fit_transform(rows)
    own = classes_of(r.values() for r in diverse.to_pylist())[("0",)]
    assert own["rare"] / own.total() == 0.5
    assert 3 / 200 < 0.02
    close = Anonymizer(spec, [KAnonymity(2), TCloseness(0.1)], method="mondrian").fit_transform(rows)
    assert len(classes_of(r.values() for r in close.to_pylist())) == 1


def test_minimality():
    """Knowing that the optimum was released and that q alone is public, an attacker learns a sensitive value.

    Two people share q = a, three share q = b. Had the two different diseases, the finer table would be 2-diverse and
    would have been released. It was not: so they have the same one.
    """
    spec = TableSpec((QuasiIdentifier("q", Hierarchy.from_rows([["a", "*"], ["b", "*"]])),), (Sensitive("ill"),))

    def level(ills):
        a = Anonymizer(spec, [KAnonymity(2), DistinctL(2)], method="optimal")
        a.fit_transform(pa.table({"q": list("aabbb"), "ill": list(ills)}))
        node = a.outcome.node
        assert node is not None
        return node[0]

    worlds = set(_arrangements("xxyyy"))
    coarse = {w for w in worlds if level(w) == 1}
    # Released coarsely, the label says 2 of 5 have x. Of the worlds that explain it, in all the first two are equal.
    assert coarse
    assert all(w[0] == w[1] or w[2] == w[3] == w[4] for w in coarse)
    before = np.mean([w[0] == w[1] for w in worlds])
    after = np.mean([w[0] == w[1] for w in coarse])
    assert before < 0.5
    assert after == 1.0


def _arrangements(letters):
    if not letters:
        yield ""
    for x in set(letters):
        yield from (x + rest for rest in _arrangements(letters.replace(x, "", 1)))


def test_downcoding():
    """Labels taken back to the raw values: a least general release says that nothing finer would have done.

    Under ``peel`` with k = 3 a town of at least three rows is final by itself. So where two towns of a county were
    joined, neither has three; a county's class of four rows is two of each: exactly, for every such class. With levels
    agreed beforehand the same classes say nothing of the kind.
    """
    hit, seen = downcoded("peel")
    assert seen >= 20
    assert hit == seen
    hit, seen = downcoded("fixed")
    print(f"of the counties of four rows, {hit / seen:.1%} have two of each town")
    assert seen >= 20
    assert 0.1 < hit / seen < 0.3  # of five equally likely splits one


def downcoded(method, k=3, counties=800, seed=3):
    """Of the released counties of 2(k - 1) rows: how many have k - 1 rows of each town, and how many there are."""
    rng = np.random.default_rng(seed)
    towns = [(f"c{i}", f"t{i}{side}") for i in range(counties) for side in "ab"]
    tree = Hierarchy.from_rows([[town, county, "*"] for county, town in towns])
    spec = TableSpec((QuasiIdentifier("place", tree, fixed_level=1),), (), (), ("who",))
    raw = [town for _, town in towns for _ in range(rng.integers(0, 5))]
    table = pa.table({"place": raw, "who": range(len(raw))})
    engine = Anonymizer(spec, [KAnonymity(k)], method=method, suppression_limit=0.2)
    members = defaultdict(list)
    for r in engine.fit_transform(table).to_pylist():
        members[r["place"]].append(raw[r["who"]])
    own = [Counter(m) for label, m in members.items() if label[0] == "c" and len(m) == 2 * (k - 1)]
    return sum(sorted(c.values()) == [k - 1, k - 1] for c in own), len(own)


def test_composition_of_two_institutions():
    """People in both hospitals' 3-diverse, 5-anonymous releases: intersecting their classes names some diseases."""
    certain, alone, shared = composition()
    print(f"certain from one release {alone:.1%}, from both {certain:.1%}, of {shared} shared people")
    assert alone == 0
    assert certain > 0.01


def composition(k=5, diversity=3, seed=11):
    """Share of shared people whose disease is certain from both releases, and from one; how many there are."""
    rng = np.random.default_rng(seed)
    n, both = 4000, 1000
    people = {
        "age": rng.integers(18, 90, n), "zip": rng.integers(0, 40, n), "sex": rng.integers(0, 2, n),
    }  # fmt: skip
    ill = rng.choice(14, n, p=(p := 1 / np.arange(1, 15)) / p.sum())
    spec = TableSpec(tuple(QuasiIdentifier(c) for c in people), (Sensitive("ill"),), (), ("who",))
    candidates = []
    for own in (np.arange(2500), np.r_[np.arange(both), np.arange(2500, n)]):
        table = pa.table({**{c: v[own] for c, v in people.items()}, "ill": ill[own], "who": own})
        released = Anonymizer(spec, [KAnonymity(k), DistinctL(diversity)], method="mondrian").fit_transform(table)
        seen, place = defaultdict(set), {}
        for r in released.to_pylist():
            label = tuple(r[c] for c in people)
            seen[label].add(r["ill"])
            place[r["who"]] = label
        candidates.append([seen[place[i]] for i in range(both)])
    one, two = candidates
    certain = float(np.mean([len(a & b) == 1 for a, b in zip(one, two, strict=True)]))
    return certain, float(np.mean([len(a) == 1 for a in one])), both
