"""The verbs of the command line, one file each: its flags, and what it does from files to files."""
