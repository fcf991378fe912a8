"""Serving a model to many clients: dynamic batches behind HTTP, in one process or in several behind one port."""
