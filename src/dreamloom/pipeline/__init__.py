"""The stages in order: train, draw, score, and score a merge."""
