"""Pictures of layouts and of runs."""
