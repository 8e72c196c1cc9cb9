"""A trained model into another: grown, merged, adapted, pruned, factorised, quantised. Functions, model to model."""
