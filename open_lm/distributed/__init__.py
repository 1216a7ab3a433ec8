"""Process groups, device mesh, sharded tensors, context parallelism, precision and random state."""

from open_lm.distributed.processes import broadcast_object, init_distributed_device, is_master, world_info_from_env

__all__ = ["broadcast_object", "init_distributed_device", "is_master", "world_info_from_env"]
