"""Shared set-up of the suite: Triton in interpreter mode, no network, one copy of the kernels."""

import os
import sys

# @triton.jit reads the mode when it decorates, so it is set before anything imports a kernel.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The repository's root is on the path here, and transformers looks for a package called "kernels": there is none.
sys.modules.setdefault("kernels", None)
