"""Builds the images with buildah, where there is no Docker: `make images`."""
