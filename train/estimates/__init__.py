"""Estimates of a training step, counted before it runs."""
