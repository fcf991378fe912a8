"""Runs compiled kernels without a GPU: the PTX that Triton writes, on NumPy, all lanes of a grid at once.

For development, never packaged. `launching.run` takes a Launch of CPU tensors; what is executed and what is checked is
said in each file: ptx.py reads the text, machine.py holds lanes and registers, schedule.py decides who goes on,
memory.py and races.py are strict about every access, and the instructions are in arithmetic.py, moving.py, warps.py,
copies.py, and for Hopper barriers.py, tensors.py and wgmma.py.
"""
