"""A run on disk: configuration, directory, training loop, sweep, checkpoints."""
