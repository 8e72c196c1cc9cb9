"""Whole models: heads, generation, conversion; nothing here knows a file of weights or a published name."""
