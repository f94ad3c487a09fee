"""Command lines: each command parses and calls one function."""
