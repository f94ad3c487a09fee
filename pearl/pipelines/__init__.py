"""From sources to datasets: sources → experts → rollout → checks → shards, on an engine."""
