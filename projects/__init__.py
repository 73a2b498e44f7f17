"""One package per paper; none imports another."""
