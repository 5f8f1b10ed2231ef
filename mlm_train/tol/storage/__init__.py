"""Where tables are stored: shared folders, object stores, node-local folders."""
