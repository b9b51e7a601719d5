"""The command line, one module per command: a dataclass `Options` and a function `run(Options) -> int`."""
