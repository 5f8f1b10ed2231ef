"""Low-rank layers: spectra, predicted errors, and the choice within a budget."""
