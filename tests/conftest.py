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


def pytest_collection_finish():
    """Lets Triton's interpreter patch the language once per launch.

    It looks through all of ``triton.language`` again at every call of a device function within a launch, and finds it
    patched: half of the time that kernels take here.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        visible = {name for name in ("tl", "core") if fn.__globals__.get(name) is not None}
        if patched and visible <= patched:
            return None  # a call within a launch: nobody restores its scope
        outermost = not patched
        patched.update(visible)
        scope = patch(fn)
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def every_warning():
    """``--quiet`` silences the process; here the next test is to see its warnings."""
    yield
    logging.getLogger("fastmerge").setLevel(logging.NOTSET)
