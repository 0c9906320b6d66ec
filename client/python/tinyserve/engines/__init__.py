"""What adapters of inference engines share. Nothing here needs an engine to be installed."""
