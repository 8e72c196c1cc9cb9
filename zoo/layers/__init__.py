"""Single layers, and the errors that all rooms use; nothing here knows of patterns, stacks or whole models."""
