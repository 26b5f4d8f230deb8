"""The secure sum: protocols under which only a sum over sites is ever opened."""
