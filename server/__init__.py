"""The coordinator's side: admission, the round, the optimiser step, checkpoints."""
