"""The critic step without wasted work: rules for layers, and the passes that put them in order."""
