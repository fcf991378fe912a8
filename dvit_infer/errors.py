"""The errors that are told in one line: what the caller can mend, and a kernel that has to run and cannot."""


class InputError(ValueError):
    """A file, an option or a tensor that cannot be used; the message is one line that names it."""


class KernelError(RuntimeError):
    """A kernel failed where PyTorch's operators may not, or can no longer, take its place; the message is one line."""
