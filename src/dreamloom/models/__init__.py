"""Base models: how they are found, loaded, spared in memory, adapted and drawn with."""
