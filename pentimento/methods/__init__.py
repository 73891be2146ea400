"""The editing methods, one file each; ``recipe.METHODS`` names them."""
