"""Label-guided auxiliary training for 3-D detection in point clouds (ECCV 2022)."""
