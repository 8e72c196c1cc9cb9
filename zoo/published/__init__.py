"""Published models in and out: presets, files, layouts; nothing here computes with activations."""
