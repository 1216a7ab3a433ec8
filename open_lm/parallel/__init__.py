"""Parallelism that is applied to a model from outside: FSDP2, DDP, tensor parallelism, fp8, compilation."""
