"""Metrics, timing, loggers, the run folder and the hang watchdog."""
