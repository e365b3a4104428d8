"""What all ranks of one replica have in common: the order of samples, the batches, the random numbers."""
