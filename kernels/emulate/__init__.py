"""Run compiled kernels without a GPU: emulate the PTX that Triton emits, in NumPy, all lanes of a grid at once.

It is for development and never packaged. `launching.run` takes a Launch of CPU tensors: ptx.py parses the text,
machine.py holds lanes and registers, schedule.py picks the lanes that execute next, memory.py and races.py check every
access. The instructions (found by opcodes.py) are in arithmetic.py, moving.py, warps.py and copies.py, those of Hopper
in barriers.py, tensors.py and wgmma.py with descriptors.py. CONTRIBUTING.md describes what a run shows and what not.
"""
