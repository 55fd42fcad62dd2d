"""The tuner of masks over a bank of adapters."""
