"""Where models come from: the hub, a folder, a GGUF file, the embedded model, or seeded random numbers."""
