"""The site's side: ingestion, the training step, the ledger and what may leave."""
