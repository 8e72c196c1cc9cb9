"""Programs compiled for TPUs and GPUs that are not here: what they need, and whether they fit."""
