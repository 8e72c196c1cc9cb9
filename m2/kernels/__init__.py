"""Kernels: implementations of operations of `m2` for one kind of device, imported when they are asked for."""
