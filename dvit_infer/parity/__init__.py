"""Is it the same function? Engines held against the reference model."""
