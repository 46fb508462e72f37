"""LoRA files: one form in memory, read from and written to every format."""
