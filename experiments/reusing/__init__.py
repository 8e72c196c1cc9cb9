"""Commands that make one model of others."""
