"""How methods run: passes over pieces of tensors, on any kernel backend.

``combine`` needs no statistics, ``gram`` solves for coefficients from inner products, ``consensus`` selects,
elects and merges deltas; ``select`` finds exact thresholds; ``native`` and ``reference`` are backends.
"""

# Methods name their families and families read the methods' tables; entering through methods keeps one order.
import fastmerge.methods  # noqa: F401
