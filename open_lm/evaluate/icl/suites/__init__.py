"""Lists of tasks, by the names that --eval-yaml and --icl-yaml accept in place of a file."""
