"""Why this image: which prototypes give a class its points, where they see themselves, and the picture of it."""
