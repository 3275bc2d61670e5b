"""What the paper does not have. The lessons at the top level import nothing of it."""
__all__ = ["ablation", "attacks", "cost", "fast", "options", "report", "runs"]
