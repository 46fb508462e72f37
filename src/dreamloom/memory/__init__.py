"""What a training needs of its device's memory, counted and predicted."""
