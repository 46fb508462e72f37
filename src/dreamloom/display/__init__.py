"""What is found and what goes on, as a terminal, a text or a notebook shows it."""
