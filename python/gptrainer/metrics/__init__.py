"""Measures of sample quality, and the norms of the critic's gradient."""
