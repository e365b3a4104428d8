"""Job control: the ranks of a Hydra job start with its config, and end with it."""
