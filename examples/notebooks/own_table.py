# %% [markdown]
# # Your own table, to the first plot
#
# From a CSV file to a trained model with a privacy claim. You need the extra `sim` and nothing else.

# %% [markdown]
# ## A table
#
# This one is made up: 1,200 patients of four wards. Name your own file instead.

# %%
from pathlib import Path

import numpy as np

rng = np.random.default_rng(0)
age, pressure = rng.integers(20, 90, 1200), rng.normal(125, 18, 1200).round(1)
smokes, ward = rng.choice(["yes", "no"], 1200), rng.choice(["north", "south", "east", "west"], 1200)
risk = 0.05 * (age - 55) + 0.04 * (pressure - 125) + (smokes == "yes")
ill = np.where(risk + rng.logistic(0, 0.5, 1200) > 0.4, "yes", "no")
rows = [",".join(map(str, row)) for row in zip(age, pressure, smokes, ward, ill, strict=True)]
Path("patients.csv").write_text("\n".join(["age,pressure,smokes,ward,ill", *rows]) + "\n")

# %% [markdown]
# ## Sites
#
# Each ward is a site. A fifth of the rows is held out as the public test table. `by=fv.Dirichlet(0.3)` would deal the
# rows out by chance instead, so that sites differ in their classes.

# %%
import fedveil as fv

sites = fv.split("patients.csv", "ill", by="ward")
print(sites)

# %% [markdown]
# ## A run at ε = 2
#
# Clip, sample rate, steps and learning rate are proposed from public numbers, and printed with their reason. The sum is
# the encrypted one. Noise is never seeded, so two runs differ a little.

# %%
run = fv.simulate("logistic", sites, epsilon=2)
print(run)

# %% [markdown]
# ## Beside its alternatives
#
# The same records: each site alone, a party that all trust, noise at every site, no privacy, guessing.

# %%
for row in run.table():
    print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})

# %% [markdown]
# ## The plot, the model, the report

# %%
print(run.plot())  # a picture of accuracy and ε over the rounds
print(run.model())  # a torch module
print(run.report.page, "verifies:", run.report.verify().ok)
