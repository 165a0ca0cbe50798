"""Searching for merges: which of many candidates is best."""
