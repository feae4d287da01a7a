"""ProtoPNet on Ray: image classifiers that show which training patches they looked at."""

__version__ = "0.1.0"
