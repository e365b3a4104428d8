"""What happened, and what is derived from it."""
