"""`gpkernels verify`: every op, penalty and training step compared with plain PyTorch in float64."""
