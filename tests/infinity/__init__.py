"""A package, so that its modules may be called as those of other backbones."""
