"""What made the weights that ship with the package."""
