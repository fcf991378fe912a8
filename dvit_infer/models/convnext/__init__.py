"""ConvNeXt (Liu et al. 2022) and DynamicConvNeXt (Rao et al. 2023)."""
