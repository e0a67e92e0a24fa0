"""infra/: what operators deploy and watch."""
