"""Mechanisms: differential privacy, the secure sum, anonymisation, the ledger and its proof."""
