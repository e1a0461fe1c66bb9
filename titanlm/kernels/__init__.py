"""Kernels written in Triton, for what the compiler does not fuse well. Each has a twin in plain torch, which runs everywhere else."""
