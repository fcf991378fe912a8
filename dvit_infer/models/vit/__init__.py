"""Plain PyTorch models with the official parameter names: the oracle, the FLOP count and the training forward."""
