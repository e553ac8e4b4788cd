"""A declared grid of training runs: settings, arms and seeds; one table and one report."""
