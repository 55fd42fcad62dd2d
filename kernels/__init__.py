"""Kernels for NVIDIA GPUs: Triton's, and ``cuda`` for select in CUDA C++; installs as ``snell.kernels``.

``kappa`` holds the device functions that every kernel calls; ``merge``, ``select``, ``factor_grad`` and
``few_tokens`` one operation each, with ``selection`` the host's part of select; ``table`` the launch
parameters and ``launch`` how they are used.
"""
