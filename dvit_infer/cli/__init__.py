"""The commands: arguments in, a call, a table out."""
