"""Parity: compare engines with the reference model."""
