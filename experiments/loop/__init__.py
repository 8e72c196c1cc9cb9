"""The training loop and what every run needs; nothing here knows a text, an image or a task."""
