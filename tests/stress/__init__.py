"""Training under random adapter events and under kills, beside training that nothing happens to."""
