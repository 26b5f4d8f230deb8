"""Experiments on one machine: simulations, the demo, baselines, public data, attacks."""
