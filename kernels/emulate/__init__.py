"""Runs compiled kernels without a GPU: the PTX that Triton writes, on NumPy, all lanes of a grid at once.

For development, never packaged. `launching.run` takes a Launch of CPU tensors: ptx.py reads the text, machine.py holds
lanes and registers, schedule.py decides which lanes go on, memory.py and races.py are strict about every access. The
instructions (opcodes.py finds them) are in arithmetic.py, moving.py, warps.py and copies.py, those of Hopper in
barriers.py, tensors.py and wgmma.py with descriptors.py. CONTRIBUTING.md says what a run shows and what it does not.
"""
