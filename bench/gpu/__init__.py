"""Everything that needs a GPU, in one resumable run: ``make gpu``; see :mod:`bench.gpu.__main__`."""
