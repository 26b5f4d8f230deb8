"""What pycanon says about a released CSV, in an environment of its own; one JSON object.

`python tests/oracles/pycanon_run.py FILE SENSITIVE QUASI...`. pycanon's recursive (c,l) is known to be wrong and is not
asked for; its distance for t is the ordered one for numbers and the equal one for texts.
"""

import json
import sys
import warnings

import pandas as pd  # type: ignore[import-not-found]
from pycanon import anonymity  # type: ignore[import-not-found]

warnings.filterwarnings("ignore")


def main(path: str, sensitive: str, quasi: list[str]) -> None:
    """k, distinct l, t, α and the others for the file as it stands."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    alpha, _ = anonymity.alpha_k_anonymity(table, quasi, [sensitive], gen=False)
    result = {
        "k": int(anonymity.k_anonymity(table, quasi)),
        "l": int(anonymity.l_diversity(table, quasi, [sensitive], gen=False)),
        "entropy": int(anonymity.entropy_l_diversity(table, quasi, [sensitive], gen=False)),
        "t": float(anonymity.t_closeness(table, quasi, [sensitive], gen=False)),
        "alpha": float(alpha),
        "basic beta": float(anonymity.basic_beta_likeness(table, quasi, [sensitive], gen=False)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
