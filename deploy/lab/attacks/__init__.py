"""Attacks on a run, and what they get without a defence, with a secure sum, and with noise in it."""
