"""Pictures of which tokens a method kept."""
