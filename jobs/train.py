"""The job `train`: see `protopnet/commands/train.py`."""

from protopnet.commands.train import main

if __name__ == "__main__":
    main()
