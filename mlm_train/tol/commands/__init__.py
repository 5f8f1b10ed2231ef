"""`mlm-train tol ...`."""
