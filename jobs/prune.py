"""The job `prune`: see `protopnet/commands/prune.py`."""

from protopnet.commands.prune import main

if __name__ == "__main__":
    main()
