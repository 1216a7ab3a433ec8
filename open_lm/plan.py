"""Say what a training run will take, without any device."""
