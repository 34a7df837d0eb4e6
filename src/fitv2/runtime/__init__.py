"""The machine: device, randomness, processes, files. It knows no images."""
