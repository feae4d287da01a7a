"""The job `workbench`: see `protopnet/commands/workbench.py`."""

from protopnet.commands.workbench import main

if __name__ == "__main__":
    main()
