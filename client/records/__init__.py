"""From a site's table to checked, recoded, equally encoded features."""
