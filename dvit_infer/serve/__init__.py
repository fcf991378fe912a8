"""Serving a model to many clients (HTTP, dynamic batches), and running it on the nodes of a Ray cluster."""
