"""Adapters: one file a host. Host names are translated here and nowhere else."""
