"""Chips, links, machines and networks as data files with a source for every figure."""
