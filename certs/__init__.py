"""Keys, certificates and the authority that issues them."""
