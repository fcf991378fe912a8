"""The one error: a kernel did what a GPU would not do, must not do, or what is not emulated."""


class EmulationError(RuntimeError):
    """Names the kernel, the instruction and, where there is one, the address."""
