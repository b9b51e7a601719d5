"""Declared sets of runs, each with its controls."""
