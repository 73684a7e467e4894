"""Other implementations as contestants, a module for each. A module's functions return the same as those in ours/."""
