"""From a plan to bytes: units within a budget, workers, devices, and where data comes from and goes."""
