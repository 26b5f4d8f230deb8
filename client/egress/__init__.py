"""What may leave a site: one gate, and closed tables of the forms that pass it."""
