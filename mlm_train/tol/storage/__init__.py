"""Where tables lie: folders, object stores, folders of each node's own."""
