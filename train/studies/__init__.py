"""Studies: which runs there are, how they are started, and the row that is kept of each."""
