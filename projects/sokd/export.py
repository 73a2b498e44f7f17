"""Write the student of a training alone, without what taught it, for `predict` or for other programs.

python -m projects.sokd.export runs/sokd/<run>/checkpoints/best.ckpt --output student.safetensors
python -m projects.sokd.export <checkpoint> --output student.onnx [--softmax]     for ONNX runtimes
python -m projects.sokd.export <checkpoint> --output student.pt2 [--softmax]      for torch.export.load

The weights keep the names of the classes, mean, std, image_size and data of the training, and its score. A graph takes
images (B, 3, image_size, image_size) in [0, 1], normalises them itself and gives logits (B, K), or probabilities.
"""

from shared.export import main

from .checkpoints import CLASSIFIERS
from .predict import usual_facts

if __name__ == "__main__":
    main(__doc__, "sokd", CLASSIFIERS, usual_facts)
