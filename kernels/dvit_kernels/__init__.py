"""Triton kernels and their launchers, one file an op; knows nothing of nn.Module."""
