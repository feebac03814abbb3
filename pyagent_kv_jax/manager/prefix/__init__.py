"""The prefix cache: which tokens requests consist of, the keys of their full blocks, and which blocks hold them."""
