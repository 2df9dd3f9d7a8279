"""The Triton kernels themselves, compiled at their first use."""
