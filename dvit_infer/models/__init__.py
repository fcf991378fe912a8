"""What a model is: a file becomes facts, facts a reference model, and that a graph."""
