"""What `serve run serve.app:build` and `python -m serve` name; the service is `protopnet.serving`."""
