"""The job `export`: see `protopnet/commands/export.py`."""

from protopnet.commands.export import main

if __name__ == "__main__":
    main()
