"""Many merges, and one merge over many machines: everything that matters is in a directory that all of them share."""
