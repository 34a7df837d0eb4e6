"""From images to token datasets."""
