"""Rendered scenes with exact truth: `layout` draws, `render` renders, `questions` asks, `samples` puts together."""
