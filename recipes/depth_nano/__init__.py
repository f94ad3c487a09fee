"""depth-nano: `data` renders, `train` trains, `evaluate` measures."""
