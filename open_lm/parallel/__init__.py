"""Parallelism applied to a model without changing it: FSDP2, DDP, tensor parallelism, fp8, compilation."""
