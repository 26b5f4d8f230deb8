"""Anonymisation of tables: recoding, criteria and their independent verification."""
