"""The service, where Serve's own commands look for it.

serve run serve/config.yaml
serve run serve.app:build bundles=runs/a/bundle,runs/b/bundle
"""

from protopnet.serving.app import build

__all__ = ["build"]
