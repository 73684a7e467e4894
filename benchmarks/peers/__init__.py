"""Other implementations as contestants, with a module for each. See ours/__init__.py for what its functions return."""
