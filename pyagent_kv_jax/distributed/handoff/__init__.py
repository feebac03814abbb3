"""Handing KV blocks from a prefill instance to a decode instance: arrays, channel, leases; no manager."""
