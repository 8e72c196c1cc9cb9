"""Encoders trained and tuned: objectives, scores, what was trained; nothing here ranks documents."""
