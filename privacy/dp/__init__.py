"""Differential privacy: sampling, clipping, integer noise, events and their accounting."""
