"""What PEFT tuners share: facts about base layers, saves, checks of checkpoints, batches that mix adapters."""
