"""Other programs' own loaders and writers against ours: `make test-clients`, docs/formats.md."""
