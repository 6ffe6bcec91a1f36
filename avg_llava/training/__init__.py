"""Training of the four stages: configuration, stage table, losses, objectives, trainer, entry point."""
