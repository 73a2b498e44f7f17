"""Reading and writing: files, images, checkpoints, the embedded photographs."""
