"""The vocabulary both sides share: errors, units, contracts, identities, journals, messages."""
