"""The pipeline: text and images in, images and text out."""
