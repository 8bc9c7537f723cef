"""A method for fedrt: a shared context, and a bias per class that stays at each silo."""
