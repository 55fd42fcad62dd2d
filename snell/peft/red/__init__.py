"""RED, representation editing, as a PEFT tuner: configuration, layer, model."""
