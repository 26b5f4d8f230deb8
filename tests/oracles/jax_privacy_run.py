"""Bounds of jax_privacy (2.0.0) for the one-run audit, in an environment of its own; one JSON line per case.

Only its module ``auditing`` is loaded, from the package's files: it needs numpy, SciPy and dp-accounting, not JAX.
`python tests/oracles/jax_privacy_run.py DELTA CANARIES:MADE:RIGHT...`
"""

import importlib.util
import json
import sys
from pathlib import Path


def load():
    found = importlib.util.find_spec("jax_privacy")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("jax_privacy is not installed here")
    path = Path(found.submodule_search_locations[0]) / "auditing.py"
    spec = importlib.util.spec_from_file_location("jax_privacy_auditing", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(delta: float, cases: list[str]) -> None:
    """Print ε by Steinke et al. and by Mahloujifar et al. at significance 0.05."""
    theirs = load()
    for case in cases:
        canaries, made, right = map(int, case.split(":"))
        plain, fdp = (
            f(0, canaries, made, right, 0.05, delta)
            for f in (theirs._epsilon_one_run, theirs._epsilon_one_run_fdp)
        )  # fmt: skip
        print(json.dumps({"case": case, "dp": float(plain), "fdp": float(fdp)}), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
