"""A run's events as a file, and a run whose messages are taken in the order of one."""
