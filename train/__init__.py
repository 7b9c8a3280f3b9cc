"""Training any layout with Lightning."""
