"""What a person starts, a module each: settings from the command line, the work, where the result is."""
