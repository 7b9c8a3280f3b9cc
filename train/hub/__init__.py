"""To and from Hugging Face folders: reading, writing, checking."""
