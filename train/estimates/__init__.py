"""Memory and time of a training step, counted from the layout. train/estimate.py prints them; training chooses its
micro-batch by them."""
