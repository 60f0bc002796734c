"""Penalties and losses of a critic without double backward: rules for calls, and the passes that apply them."""
