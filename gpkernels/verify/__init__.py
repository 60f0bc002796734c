"""`gpkernels verify`: the numbers of every op, penalty and training step against plain PyTorch in float64."""
