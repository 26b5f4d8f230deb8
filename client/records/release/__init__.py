"""From checked values to a verified release and its encoding, with the signed lineage record."""
