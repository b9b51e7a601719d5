"""The fuzz campaign, which `make fuzz` runs: `python -m fuzz --help`."""
