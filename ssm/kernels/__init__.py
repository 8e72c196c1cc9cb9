"""Kernels for one kind of machine each, imported where a program for that machine is lowered."""
