"""Write the network of a training alone, as .safetensors, for `predict` or as the start of another training.

    python -m projects.bvfi.export runs/bvfi/<run>/checkpoints/best.ckpt weights.safetensors

What a finished run scored goes into the file's metadata.
"""

from shared.experiment import run_or_exit
from shared.export_network import main

from .checkpoints import build_network, read_network, save_network

if __name__ == "__main__":
    run_or_exit(main, __doc__, read_network, build_network, save_network)
