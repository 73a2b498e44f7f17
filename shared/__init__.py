"""What all projects stand on: reading and writing, metrics, kernels, running an experiment, proving a claim."""
