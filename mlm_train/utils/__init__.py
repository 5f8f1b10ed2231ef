"""Helpers that know nothing of models: files, records, units, locks, signals, terminals."""
