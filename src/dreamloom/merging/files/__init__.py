"""LoRA files in, one merged LoRA file out, which says and proves how it was made."""
