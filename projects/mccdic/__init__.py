"""Multi-contrast MRI super-resolution and reconstruction by an unfolded convolutional dictionary model (IJCAI 2023)."""
