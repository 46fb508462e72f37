"""Studies: many runs side by side that answer one question."""
