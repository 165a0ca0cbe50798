"""Pages that a person would rather look at: one HTML file without scripts, which loads nothing from elsewhere."""
