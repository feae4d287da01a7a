"""Serve bundles over HTTP from this machine. See `protopnet/commands/serve.py`."""

from protopnet.commands.serve import main

main()
