"""Select, elect and merge task vectors."""
