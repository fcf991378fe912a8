"""Swin Transformer (Liu et al. 2021) and DynamicSwin (Rao et al. 2023)."""
