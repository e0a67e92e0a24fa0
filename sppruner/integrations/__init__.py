"""Implementations of other projects' interfaces. Each module requires the project in its name."""
