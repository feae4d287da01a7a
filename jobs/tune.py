"""The job `tune`: see `protopnet/commands/tune.py`."""

from protopnet.commands.tune import main

if __name__ == "__main__":
    main()
