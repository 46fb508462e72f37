"""Training: batches, noise, losses and optimizers, the loop over them, and checkpoints."""
