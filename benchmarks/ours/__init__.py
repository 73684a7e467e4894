"""This repository as a contestant, with a module for each benchmark."""
