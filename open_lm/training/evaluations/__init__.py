"""Evaluations of the live model: validation, tasks of in-context learning, text samples."""
