"""File names, the process, the machine and the hub: what every package may import."""
