"""The parameter server: a process that owns the weights and the optimizers, and the workers' connections to it."""
