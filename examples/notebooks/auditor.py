# %% [markdown]
# # Read and check a report, as an auditor
#
# A run's folder holds a report, signed journals and the opened sums, and no data. All that the report claims follows
# from them. Checking needs the extra `audit` only; the first cell needs `sim`, since it makes a report to check.

# %%
import fedveil as fv

run = fv.simulate("logistic", fv.split("trivial", clients=4), epsilon=4, steps=6, compare=False, quiet=True)
print(run.folder)

# %% [markdown]
# ## Read it
#
# Who is protected, against whom, and how strongly.

# %%
import json

report = json.loads(run.report.path.read_text())["payload"]
claim, trust, mechanism = report["claim"], report["trust"], report["mechanism"]
print("protects:", trust["protects"])
print("against:", "; ".join(trust["against"]))
print(f"ε = {claim['epsilon']:.4f} at δ = {claim['delta']:g}, {report['steps']['planned']} steps")
print("not covered:", *report["not_covered"], sep="\n  ")

# %% [markdown]
# ## Check it
#
# The same as `fedveil audit verify`. A real auditor gives the consortium's key (`consortium_key`), which comes from
# somebody who is trusted and not from the folder.

# %%
from fedveil.privacy.report.verify import verify_report

found = verify_report(run.report.path)
for check in found.checks:
    print("ok  " if check.passed else "FAIL", check.name, "|", check.detail[:90])
print(found.claim)

# %% [markdown]
# ## Check ε by hand
#
# Here every record is in every step. So T steps with noise multiplier σ are one Gaussian mechanism with σ/√T, whose δ
# at a given ε has a closed form (Balle and Wang 2018). It must give the report's δ.

# %%
from math import erf, exp, sqrt


def phi(x: float) -> float:
    """The normal distribution's share below x."""
    return (1 + erf(x / sqrt(2))) / 2


epsilon, sigma = claim["epsilon"], mechanism["noise_multiplier"] / sqrt(report["steps"]["planned"])
delta = phi(1 / (2 * sigma) - epsilon * sigma) - exp(epsilon) * phi(-1 / (2 * sigma) - epsilon * sigma)
print(f"by hand δ = {delta:.3g}, claimed δ = {claim['delta']:.3g}")
if not 0.9 < delta / claim["delta"] < 1.01:
    raise SystemExit("the closed form does not give the claimed δ")

# %% [markdown]
# ## A forged report is refused
#
# The same folder with a smaller ε. The signature does not fit, and every check that builds on it fails with it.

# %%
import shutil
from pathlib import Path

forged = Path(shutil.copytree(run.folder, f"{run.folder}-forged"))
whole = json.loads((forged / "report.json").read_text())
whole["payload"]["claim"]["epsilon"] = 1.0
(forged / "report.json").write_text(json.dumps(whole))
refused = verify_report(forged / "report.json")
print("failed:", ", ".join(check.name for check in refused.failures))
if refused.ok:
    raise SystemExit("a forged report passed")
