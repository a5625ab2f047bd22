"""The command line: each command checks what it was given, and calls the room that does the work."""
