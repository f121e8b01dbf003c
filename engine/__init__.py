"""Continuous batching: who runs next, which memory holds whose keys and values, and the step that computes them."""
