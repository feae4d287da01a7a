"""The job `prepare`: see `protopnet/commands/prepare.py`."""

from protopnet.commands.prepare import main

if __name__ == "__main__":
    main()
