"""The job `score`: see `protopnet/commands/score.py`."""

from protopnet.commands.score import main

if __name__ == "__main__":
    main()
