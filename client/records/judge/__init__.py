"""What a table is like, and what forbids its use: quality, identifiers, drift, a first draft of a contract."""
