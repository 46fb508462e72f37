"""Detectors of what drawn faces get wrong: eyes, teeth, and faces too many or too few."""
