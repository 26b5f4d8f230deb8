"""The commands of ``fedveil``, one file each (a command with many parts has a few, all beginning with its name)."""
