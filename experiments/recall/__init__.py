"""Synthetic tasks of recall and state tracking: rows, presets, answers and their score; no text or tokenizer."""
