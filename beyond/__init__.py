"""What the paper does not have, and the machinery of train.py."""
