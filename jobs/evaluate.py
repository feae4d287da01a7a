"""The job `evaluate`: see `protopnet/commands/evaluate.py`."""

from protopnet.commands.evaluate import main

if __name__ == "__main__":
    main()
