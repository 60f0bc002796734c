"""`gpkernels bench`: ops, critic steps and whole training beside what others do, in one run on one machine."""
