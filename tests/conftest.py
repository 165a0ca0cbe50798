"""Shared set-up of the suite: Triton in interpreter mode, no network, one copy of the kernels."""

import logging
import os
import sys

import pytest

# @triton.jit reads the mode when it decorates, so it is set before anything imports a kernel.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The repository's root is on the path here, and transformers looks for a package called "kernels": there is none.
sys.modules.setdefault("kernels", None)


@pytest.fixture(autouse=True)
def every_warning():
    """``--quiet`` silences the process; here the next test is to see its warnings."""
    yield
    logging.getLogger("fastmerge").setLevel(logging.NOTSET)
