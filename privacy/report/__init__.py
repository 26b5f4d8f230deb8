"""The privacy report: built from journals, rendered for people, recomputed by anybody."""
