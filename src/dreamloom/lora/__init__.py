"""The one in-memory form of an adapter, and the files it is read from and written to."""
