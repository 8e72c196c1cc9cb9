"""A trained model into another: merged, adapted, quantised. Pure functions, from models to models."""
