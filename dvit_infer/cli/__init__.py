"""The commands: parse arguments, call the library, print a table."""
