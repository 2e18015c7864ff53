"""The CPU kernels: C++ sources, how they are built and called, and the packed linear layers. Imports nothing; see cpu_ops.py."""
