"""Every setting: names, defaults, limits and descriptions, and how files of them are read."""
