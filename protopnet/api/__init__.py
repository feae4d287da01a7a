"""What a notebook uses: bundles in, images in, and results that show themselves. `protopnet` has its names."""
