"""Channel pruning plug-in for point-based networks (CVPR 2023)."""
