"""Plain PyTorch models with the official parameter names, for parity, MAC counts and training."""
