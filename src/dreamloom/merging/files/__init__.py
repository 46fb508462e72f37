"""Stage 6: several adapters in, one adapter file out, which says and proves how it was made."""
