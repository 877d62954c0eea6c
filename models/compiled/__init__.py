"""What the kernels that numba compiles for the CPU share: the vector type, and threads."""
