"""A model that ranks hold together: each owns a part, and rank 0 can have the whole."""
