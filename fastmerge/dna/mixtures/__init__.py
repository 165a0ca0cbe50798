"""Mixtures of experts made of dense models, of other mixtures, and of fewer of their own experts."""
