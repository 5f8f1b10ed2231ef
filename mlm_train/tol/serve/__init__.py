"""Serving a table: reading its rows."""
