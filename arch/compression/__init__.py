"""Compression of caches at evaluation: how a slot is stored (codecs), and which positions stay (keeps)."""
