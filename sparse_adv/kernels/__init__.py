"""Triton kernels and their launchers: plain functions on tensors, which `ops` registers for GPUs when it needs them."""
