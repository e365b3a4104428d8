"""How the weights that a rank trains are updated: by its own optimizer, by a parameter server, or by averaging."""
