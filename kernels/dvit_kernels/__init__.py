"""Triton kernels and their launchers, one file per op. Nothing here depends on nn.Module."""
