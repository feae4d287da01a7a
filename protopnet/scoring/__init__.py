"""Bulk scoring: any number of images to Parquet, in fixed chunks, so that it can be killed and go on."""
