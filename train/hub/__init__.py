"""Hugging Face folders: reading, writing, verifying."""
