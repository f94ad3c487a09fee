"""Speed and memory: one script a claim; docs/performance.md has the figures."""
