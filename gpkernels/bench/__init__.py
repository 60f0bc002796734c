"""`gpkernels bench`: times of ops, critic steps and training against eager PyTorch and other implementations."""
