"""Evidence beside the claim: statistics on what was really released. Pure: numpy, SciPy, dp-accounting; no torch."""
