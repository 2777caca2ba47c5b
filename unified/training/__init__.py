"""Training: configuration, batches, loop, checkpoints, logs."""
