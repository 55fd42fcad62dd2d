"""One file an experiment: what it measures and what it shows of it; ``run`` is its command."""
