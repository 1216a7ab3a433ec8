"""Code that exists only to be fast: fused losses and activations, CPU attention, native C++ kernels."""
