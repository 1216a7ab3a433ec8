"""Fine-tuning of pretrained models: supervised, with adapters, by distillation, on preferences and rewards."""
