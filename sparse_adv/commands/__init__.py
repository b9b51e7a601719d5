"""The command line: a module for each command, with a dataclass `Options` and a function `run(Options) -> int`.

They share `options` (their flags), `flag_values`, `config_files`, `out_folder`, `networks` and `output`.
"""
