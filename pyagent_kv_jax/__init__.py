"""A paged KV cache for JAX: block tables, block pools and caches as pytrees."""
