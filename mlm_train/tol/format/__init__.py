"""A table's files: index, partitions, codec."""
