"""Other libraries' training loops and layers. Optional imports live only here."""
