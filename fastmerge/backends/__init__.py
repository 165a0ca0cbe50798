"""What runs the kernels: C++ on CPU cores, Triton on GPUs, or the definitions in plain torch; and the choice."""
