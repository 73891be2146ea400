"""Infinity (arXiv:2412.04431): bitwise autoregressive text-to-image, scale by scale."""
