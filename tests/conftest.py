"""Shared set-up of the suite: Triton in interpreter mode, no network, one copy of the kernels."""

import gc
import logging
import os
import sys

import pytest

from tests.interpreter import quicken

# @triton.jit reads the mode when it decorates, so it is set before anything imports a kernel.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The repository's root is on the path here, and transformers looks for a package called "kernels": there is none.
sys.modules.setdefault("kernels", None)


def pytest_collection_finish():
    """What every one of some thousand tests would pay for otherwise."""
    quicken()
    # To loggers that pass nothing on pytest attaches its handlers one by one, six times a test; torch has dozens.
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True
    gc.freeze()  # a million objects of libraries and of the collection, through which no test's garbage is to be sought


@pytest.fixture(autouse=True)
def every_warning():
    """``--quiet`` silences the process; here the next test is to see its warnings."""
    yield
    logging.getLogger("fastmerge").setLevel(logging.NOTSET)
