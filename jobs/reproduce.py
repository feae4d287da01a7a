"""The job `reproduce`: see `protopnet/commands/reproduce.py`."""

from protopnet.commands.reproduce import main

if __name__ == "__main__":
    main()
