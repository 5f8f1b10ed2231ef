"""Helpers independent of models: files, records, units, locks, signals, terminals."""
