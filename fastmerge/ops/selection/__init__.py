"""Exact thresholds without a sort."""
