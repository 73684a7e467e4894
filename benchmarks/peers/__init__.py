"""Other implementations as contestants, with a module for each."""
