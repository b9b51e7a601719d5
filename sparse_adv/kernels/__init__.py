"""Triton kernels and their launchers: plain functions on tensors. `ops` registers them for GPUs when needed."""
