"""Errors reported in one line: bad input, and a kernel that is required and cannot run."""


class InputError(ValueError):
    """A file, an option or a tensor that cannot be used; the message is one line that names it."""


class KernelError(RuntimeError):
    """A kernel failed and PyTorch's operators may not, or can no longer, replace it; the message is one line."""
