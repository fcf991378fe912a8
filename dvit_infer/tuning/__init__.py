"""The fastest reduction of a model, on this machine, that keeps its answers: a search over methods, places, rates."""
