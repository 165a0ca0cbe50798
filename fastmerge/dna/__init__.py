"""DNA transfer: a model of another shape out of the weights of one that is there."""
