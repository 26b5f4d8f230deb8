"""What may leave a site: one gate, and closed tables of what may pass it."""
