"""The ensemble behind HTTP, on Ray Serve. `app.build` is the entry; `docs/operations.md` tells how to run it."""
