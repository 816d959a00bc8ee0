"""The command line: one module per family of commands, which parses, calls one function and prints."""
