"""Adapters to other projects' interfaces. Each module needs the project it is named after."""
