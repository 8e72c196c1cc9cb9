"""Models that read images and texts: language models that are asked about pictures, and pairs of encoders."""
