"""What a person sees of a run: lines while it goes, a page on loopback, a picture."""
