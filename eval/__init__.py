"""Counting, measuring and comparing models."""
