"""Other implementations as contestants: a module for each. ours/__init__.py says what their functions return."""
