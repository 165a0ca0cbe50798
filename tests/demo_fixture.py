"""The demo's models for end-to-end tests: ``fixture(cache_dir)`` and ``accuracy(model_dir)``."""

import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo"
if str(DEMO) not in sys.path:
    sys.path.append(str(DEMO))

from skills import SKILLS, accuracy, complete
from train import fixture

__all__ = ["SKILLS", "accuracy", "complete", "fixture"]
