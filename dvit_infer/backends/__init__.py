"""Backends: node kind -> what runs it. A backend is one file."""
