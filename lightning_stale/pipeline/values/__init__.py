"""What may travel between two stages: trees of tensors, and tensors with their strides."""
