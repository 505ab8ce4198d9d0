"""Runs on disk: configuration, directory, training loop, sweep, checkpoints, callbacks."""
