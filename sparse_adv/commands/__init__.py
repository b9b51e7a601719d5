"""The command line: a module for each command, with a dataclass `Options` and a function `run(Options) -> int`.

`options`, `config_files`, `networks` and `output` are what the commands share.
"""
