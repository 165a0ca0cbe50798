"""The version, in one place; it is part of every journal's fingerprint."""

__version__ = "0.1.0"
