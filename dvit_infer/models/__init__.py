"""Models: a file becomes facts, the facts become a reference model, and the model becomes a graph."""
