"""Between floors 3 and 4: caches over the devices of a mesh, and over several of them."""
