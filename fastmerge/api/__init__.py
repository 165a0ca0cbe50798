"""The public calls: merges of files and of tensors, task vectors, experts."""
