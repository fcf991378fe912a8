"""Write a checkpoint in the official format with random weights: python examples/write_checkpoint.py ARCH OUT.pth"""

import sys

import torch

from dvit_infer.models.example import example_checkpoint

if len(sys.argv) != 3:
    sys.exit(__doc__)
torch.save(example_checkpoint(sys.argv[1]), sys.argv[2])
print(f"wrote {sys.argv[2]}: {sys.argv[1]} with random weights, as the official trainer saves it")
