"""Causal language models below their commands: a loss and its price, and a student that learns from its teacher."""
