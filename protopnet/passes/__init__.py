"""A network over images without gradients, as a Ray Data map: the pass itself, and what several rooms look for with it."""
