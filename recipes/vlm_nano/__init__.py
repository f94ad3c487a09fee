"""vlm-nano: `data` renders and asks, `model` builds, `train` trains in stages, `evaluate` measures."""
