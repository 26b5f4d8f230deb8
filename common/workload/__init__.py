"""What a run computes on records: a network or statistics, written as data and not as code. Does not import torch."""
