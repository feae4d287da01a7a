"""The job `import_checkpoint`: see `protopnet/commands/import_checkpoint.py`."""

from protopnet.commands.import_checkpoint import main

if __name__ == "__main__":
    main()
