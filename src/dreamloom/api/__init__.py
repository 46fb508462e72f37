"""The Python door: what the command line can, as functions whose results one can go on with."""
