"""Ranks and kernels: mesh, attention, offload, CUDA graphs. Knows nothing of video."""
