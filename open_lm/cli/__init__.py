"""The console command `open-lm`, and programs that are only commands."""
