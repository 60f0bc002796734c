"""A reference trainer on gpkernels: the GANs of the papers, resumable bit for bit, and measures of their quality."""
