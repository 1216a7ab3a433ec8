"""Optimized kernels: fused losses and activations, CPU attention, native C++ kernels."""
