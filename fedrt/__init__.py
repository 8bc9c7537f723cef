"""fedrt: hospitals adapt one frozen CLIP model together without moving an image."""

__version__ = "0.1.0"
