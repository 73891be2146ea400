"""FLUX.1 (dev and Fill) over diffusers."""
