"""Which implementation runs a call, and the lazy imports of the kernels."""
