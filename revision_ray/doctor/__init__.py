"""What a cluster must have before money is spent on it."""
