"""FMambaIR: lightweight image super-resolution with a first-order-hold state space model."""
