"""How the vector index is built: its statement, its partitions, its memory, its warm pages."""
