"""The only error: a kernel did something invalid, undefined or not emulated."""


class EmulationError(RuntimeError):
    """Names the kernel, the instruction and, if any, the address."""
