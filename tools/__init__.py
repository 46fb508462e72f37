"""Programs for those who work on DreamLoom; none of them is installed with it."""
