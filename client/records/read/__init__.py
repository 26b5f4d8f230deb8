"""From a source (file, database, FHIR) to batches of values of the contract's columns."""
