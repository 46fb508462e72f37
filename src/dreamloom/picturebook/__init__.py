"""The picturebook: a tiny SDXL, and the drawn world that it learned from."""

from pathlib import Path


def weights_folder() -> Path:
    """Return the folder of the embedded base model, in diffusers' layout."""
    return Path(__file__).parent / "weights"
