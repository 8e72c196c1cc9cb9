"""Image classifiers trained and asked: presets, the task, what is written of a run; no text is known here."""
