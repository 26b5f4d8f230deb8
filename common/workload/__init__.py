"""What a run computes on records: a network or a set of statistics, as data that names no code. Knows no torch."""
