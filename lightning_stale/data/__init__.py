"""Batches by lease: who is free gets the next one, and every batch of an epoch is trained once."""
