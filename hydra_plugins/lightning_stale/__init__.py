"""What Hydra loads into every app once lightning-stale is installed; imports nothing but Hydra."""
