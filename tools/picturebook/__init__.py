"""How the built-in model was made and how it is measured: its world, its training, its scores."""
