"""Optimizers, gradient clipping, learning-rate schedules and weight averaging."""
