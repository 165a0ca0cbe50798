"""Placeholder."""

from typing import Any

Kernels = Any
