"""What a training step will need, counted before it runs."""
