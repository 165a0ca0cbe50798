"""Operations: one family of kernels per file, with the passes that run it and the blocks of its definition."""
