"""Helpers for all packages: files, devices, tables, optional packages. Imports only `errors` from this project."""
