"""The one error that is the caller's to mend."""


class InputError(ValueError):
    """A file, an option or a tensor that cannot be used; the message is one line that names it."""
