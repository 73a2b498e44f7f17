"""UniKD: knowledge distillation of features and logits under one distribution constraint."""
