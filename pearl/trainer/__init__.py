"""From trajectories to a trained vision-language model: conversation → views → packing → objectives → loop."""
