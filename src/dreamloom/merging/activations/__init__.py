"""Activations of the base model that merge methods need: Gram matrices, masks."""
