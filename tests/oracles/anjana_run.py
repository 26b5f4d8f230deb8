"""Anonymise Adult with anjana, in an environment of its own (it does not resolve beside flwr); one JSON line per case.

`python tests/oracles/anjana_run.py DATA_FOLDER CASE...` where a case is k, k:l3 or k:t0.2 (k 5 percent suppressed).
"""

import json
import sys
import time
import warnings
from pathlib import Path

import pandas as pd  # type: ignore[import-not-found]
from anjana.anonymity import k_anonymity, l_diversity, t_closeness  # type: ignore[import-not-found]

warnings.filterwarnings("ignore")
QUASI = ["age", "workclass", "education", "marital-status", "race", "sex", "native-country"]
SENSITIVE = "occupation"


def main(folder: Path, cases: list[str]) -> None:
    """Time each case on a fresh copy, in CPU seconds of this process; reading files is not timed."""
    table = pd.read_csv(folder / "adult_arx_30162.csv", sep=";")
    levels = {
        q: dict(pd.read_csv(folder / "adult_hierarchies" / f"adult_hierarchy_{q}.csv", sep=";", header=None))
        for q in QUASI
    }
    for case in cases:
        k, _, extra = case.partition(":")
        data = table.copy()
        start = time.process_time()
        if extra.startswith("l"):
            out = l_diversity(data, [], QUASI, SENSITIVE, int(k), int(extra[1:]), 5, levels)
        elif extra.startswith("t"):
            out = t_closeness(data, [], QUASI, SENSITIVE, int(k), float(extra[1:]), 5, levels)
        else:
            out = k_anonymity(data, [], QUASI, int(k), 5, levels)
        seconds = time.process_time() - start
        groups = out.groupby(QUASI, observed=True).size() if len(out) else []
        print(json.dumps({"case": case, "seconds": seconds, "rows": len(out), "classes": len(groups)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
