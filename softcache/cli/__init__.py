"""The command line: each file parses a family of commands, calls one function and prints."""
