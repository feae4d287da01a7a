"""The job `explain`: see `protopnet/commands/explain.py`."""

from protopnet.commands.explain import main

if __name__ == "__main__":
    main()
