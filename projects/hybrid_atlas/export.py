"""Write the network of a training alone, as .safetensors, for `predict` or as the start of another training.

    python -m projects.hybrid_atlas.export runs/hybrid_atlas/<run>/checkpoints/best.ckpt weights.safetensors

What a finished run scored goes into the file's metadata.
"""

from shared.experiment import run_or_exit
from shared.export_network import main

from .checkpoints import read_network, save_network
from .model import build_network

if __name__ == "__main__":
    run_or_exit(main, __doc__, read_network, build_network, save_network)
