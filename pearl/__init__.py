"""Pearl: predictive embedding alignment for reasoning in latent space (arXiv 2604.08065)."""

__version__ = "0.1.0"
