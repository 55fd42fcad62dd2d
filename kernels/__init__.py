"""Triton kernels for NVIDIA GPUs; installs as ``snell.kernels``."""
