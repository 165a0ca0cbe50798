"""Shared set-up of the suite: Triton in interpreter mode, no network, no stray threads."""

import os

# @triton.jit reads the mode when it decorates, so it is set before anything imports a kernel.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
