"""mergekit's commands, with its flags, over this engine."""
