"""A run's records in, one HTML page out that tells its story without a network."""
