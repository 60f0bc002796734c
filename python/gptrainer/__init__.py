"""A thin reference trainer on gpkernels: WGAN and WGAN-GP, from a seed to pictures and numbers."""
