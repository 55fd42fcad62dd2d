"""Checks that the tests and ``snell doctor`` share: error bounds, cases, and every operation against the reference."""
