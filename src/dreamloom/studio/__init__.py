"""The studio: a page on this machine, where everything is a folder that the commands know, too."""
