"""Measurements that anyone can run again; results are committed with the command that made them."""
