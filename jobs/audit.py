"""The job `audit`: see `protopnet/commands/audit.py`."""

from protopnet.commands.audit import main

if __name__ == "__main__":
    main()
