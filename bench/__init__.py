"""Measurements: the demonstration on real data, micro-benchmarks, model benchmarks."""
