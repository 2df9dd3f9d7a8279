"""Complexity of contexts: scores, and a linear probe that reads them from activations."""
